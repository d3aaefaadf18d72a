"""Weights to remove per matrix <-> an `Allocation` as `prune` takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..model.architecture import Weight
from ..pruning.allocation import Allocation, split_count


Units = Mapping[str, Sequence[Weight]]  # unit -> its matrices


def allocation_of(counts: Mapping[str, int], blocks: Units, name: str = "custom") -> Allocation:
    """Counts per matrix as an `Allocation`: per block where all matrices of every block have one sparsity.

    Args:
        counts: matrix -> weights to remove, in the model's order.
        blocks: block -> its matrices; all matrices stand in one.
    """
    parts = {block: {weight.name: weight.size for weight in weights} for block, weights in blocks.items()}
    totals = {block: sum(counts[matrix] for matrix in sizes) for block, sizes in parts.items()}
    # Only where `prune` would divide each block into these very counts again.
    if all(split_count(totals[block], sizes) == {m: counts[m] for m in sizes} for block, sizes in parts.items()):
        sizes = {block: sum(matrices.values()) for block, matrices in parts.items()}
        return Allocation({block: totals[block] / sizes[block] for block in sizes}, sizes, name, "block")
    sizes = {matrix: size for matrices in parts.values() for matrix, size in matrices.items()}
    sizes = {matrix: sizes[matrix] for matrix in counts}
    return Allocation({matrix: counts[matrix] / size for matrix, size in sizes.items()}, sizes, name, "matrix")


def counts_of(allocation: Allocation, units: Units, floors: Mapping[str, int] | None = None) -> dict[str, int]:
    """Matrix -> weights to remove: each unit's divided over its matrices as `prune` divides them.

    `floors`: matrix -> the fewest that it loses.
    """
    counts: dict[str, int] = {}
    for unit, count in allocation.counts().items():
        counts |= split_count(count, {weight.name: weight.size for weight in units[unit]}, floors)
    return counts
