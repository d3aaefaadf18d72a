"""The columns of a run, one after the other: each is pruned, and those behind it make up for it.

The reference, in PyTorch, and the choice between it and one kernel that does the same for all columns of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


# (block, upper, dead, keep, neighbours, removed) -> errors, see `eliminate`
Eliminate = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, int], Tensor]

# What the kernel holds of a row at once, and compares with each other: more does not fit in registers.
WIDEST, MOST_NEIGHBOURS = 256, 32


def eliminate(
    block: Tensor, upper: Tensor, dead: Tensor, keep: Tensor | None, neighbours: int = 0, removed: int = 0
) -> Tensor:
    """Prune the columns of `block`, in place, each as it is when the ones before it are gone; the errors they leave.

    Args:
        block: (width, out_features) float32, neighbouring columns of a weight, one a row.
        upper: (width, width) float32, their part of U, the upper Cholesky factor of (X·Xᵀ + damping)⁻¹ = Uᵀ·U.
        dead: (width,) bool, inputs that never fired: their weights go first.
        keep: (out_features, width) bool, what stays; with `neighbours`, what may stay, or `None` where all may.
        neighbours: so many columns, which divide the width, lose the `removed` lowest of (w / U_jj)² when their first
            is reached, what may not stay before all others; among equals the first.

    Returns:
        (width, out_features): what was removed, over U_jj. The columns behind the block lose its product with U.
    """
    errors, diagonal = torch.empty_like(block), upper.diagonal()
    kept = torch.ones_like(block, dtype=torch.bool) if keep is None else keep.t().clone()
    for j in range(len(block)):
        if neighbours and j % neighbours == 0:
            group = slice(j, j + neighbours)
            scores = (block[group] / diagonal[group, None]).square_().masked_fill_(dead[group, None], 0)
            scores.masked_fill_(~kept[group], -1)
            # Unlike topk, a stable sort says which of equal scores comes first, on every device.
            kept[group].scatter_(0, scores.argsort(dim=0, stable=True)[:removed], False)
        torch.div(block[j], upper[j, j], out=errors[j]).masked_fill_(kept[j], 0)
        block[j:].addr_(upper[j, j:], errors[j], alpha=-1)
        # The update leaves roundings near zero here; zeros are exact.
        block[j].masked_fill_(~kept[j], 0)
    return errors


def elimination_on(device: torch.device, width: int, neighbours: int = 0) -> Eliminate:
    """What eliminates runs of up to `width` columns there: the kernel, where it can, or `eliminate`."""
    if device.type == "cuda" and width <= WIDEST and neighbours <= MOST_NEIGHBOURS:
        return _kernel() or eliminate
    return eliminate


@lru_cache
def _kernel() -> Eliminate | None:
    """The kernel, where Triton is installed: PyTorch brings it along where it can use it."""
    try:
        from .elimination_kernel import eliminate_in_one
    except ImportError:
        return None
    return eliminate_in_one
