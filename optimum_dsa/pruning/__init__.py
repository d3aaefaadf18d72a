"""Which weights go: from scores and a sparsity per unit to masks, one block after the other."""
