"""Inside PEFT: adapters that keep every zero when they are merged."""
