"""Discovering an allocation: what to try, how good it is, what was tried."""
