"""Learners: which structures stay is learned from text, under the budget, instead of read off an importance."""

# They register themselves where they stand.
from . import deterministic_gates, hard_concrete, policy_gradient, projected_gates
from .learner import LEARNERS


__all__ = ["LEARNERS", "deterministic_gates", "hard_concrete", "policy_gradient", "projected_gates"]
