"""Outputs as their users take them, in a process that knows nothing of this package."""
