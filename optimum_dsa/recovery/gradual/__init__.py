"""Inside any Trainer: zeros that stay, and sparsity that grows."""
