"""Training under a budget: the zeros move while the model is trained, and end as many as the budget says."""
