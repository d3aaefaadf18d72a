"""`optimum-cli dsa`: nothing here imports torch or transformers before a command runs."""
