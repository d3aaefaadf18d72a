"""Ranks of adapters from an allocation: more where more was pruned."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...pruning.allocation import Allocation
from ...pruning.allocation.budget import split_count


def ranks_for(allocation: Allocation, rank: int) -> dict[str, int]:
    """Unit -> rank, at least 1, in proportion to the unit's sparsity and `rank` on average over the units.

    In an allocation without any sparsity every unit gets `rank`.

    The idea that ranks follow from what pruning did to a layer is that of LoSA, https://arxiv.org/abs/2502.14816.
    """
    if rank < 1:
        raise ValueError(f"rank is at least 1, got {rank}.")
    if not any(allocation.sparsity.values()):
        return dict.fromkeys(allocation.sparsity, rank)
    # one for each unit, and the rest in proportion; in parts per million, as whole numbers are divided
    shares = {unit: round(value * 1_000_000) for unit, value in allocation.sparsity.items()}
    free = (rank - 1) * len(shares)
    scale = max(free, 1)
    more = split_count(free, {unit: share * scale for unit, share in shares.items()})
    return {unit: 1 + count for unit, count in more.items()}


def pattern_of(values: Mapping[str, float]) -> dict[str, float]:
    """Values by unit -> peft's `rank_pattern` or `alpha_pattern`: by regular expressions of module names."""
    return {_modules_of(unit): value for unit, value in values.items()}


def _modules_of(unit: str) -> str:
    """A regular expression of the modules of a unit: those in a block, or the one that owns a matrix."""
    if unit.endswith(".weight"):
        return re.escape(unit.removesuffix(".weight"))
    return rf"{re.escape(unit)}\..*"
