"""What a transformers model is made of, and what passes through it."""
