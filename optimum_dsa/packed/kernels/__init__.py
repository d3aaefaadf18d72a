"""Sources of the kernels, and how they are compiled."""
