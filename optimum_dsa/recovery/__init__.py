"""Training that keeps every zero: sparse adapters, a Trainer callback, and recovery after pruning."""
