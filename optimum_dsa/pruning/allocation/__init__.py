"""How much to prune where: operations, allocation functions, named allocators, exact budgets."""

from .allocators import ALLOCATIONS, Allocator, Heuristic, measured_in_one_walk
from .budget import ALLOCATION_FILE, Allocation, fit_to_budget, fit_to_matrices, is_repository, split_count
from .function import AllocationFunction
from .levels import fit_to_levels, levels_within
from .operations import POST_PROCESS, PRE_PROCESS, REDUCTION, TRANSFORM
from .unit import Unit
from .whole import FromModel, Seen


__all__ = [
    "ALLOCATIONS",
    "ALLOCATION_FILE",
    "POST_PROCESS",
    "PRE_PROCESS",
    "REDUCTION",
    "TRANSFORM",
    "Allocation",
    "AllocationFunction",
    "Allocator",
    "FromModel",
    "Heuristic",
    "Seen",
    "Unit",
    "fit_to_budget",
    "fit_to_levels",
    "fit_to_matrices",
    "is_repository",
    "levels_within",
    "measured_in_one_walk",
    "split_count",
]
