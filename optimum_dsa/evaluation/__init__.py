"""How good a model is: perplexity, tasks, and results side by side."""
