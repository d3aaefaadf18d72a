"""Weight updates: what the kept weights become once the others are gone.

An update is (weight, statistics, `Choice`) -> new weight, (out_features, in_features), with exact zeros. It never
changes its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.statistics import LayerStatistics
from .admm import admm
from .choice import UPDATES, Choice
from .dsnot import dsnot
from .elimination import elimination_on
from .floors import numbers_of_sets
from .patterns import Pattern, count_in_columns
from .refit import refit
from .swap import swap


__all__ = ["UPDATES", "Choice", "none", "sparsegpt"]

UPDATES.add("admm", admm, reference="https://arxiv.org/abs/2406.07831", reads="gram", chooses=True)
UPDATES.add("dsnot", dsnot, reference="https://arxiv.org/abs/2310.08915", reads="mean", moves=True)
UPDATES.add("refit", refit, reference="https://arxiv.org/abs/2406.07831", reads="gram")
UPDATES.add("swap", swap, reference="https://arxiv.org/abs/2512.10922", reads="gram", moves=True)


@UPDATES.register()
def none(weight: Tensor, statistics: LayerStatistics | None, choice: Choice) -> Tensor:
    """The weight, (out_features, in_features), with zeros where it is pruned, and nothing else changed."""
    return weight.masked_fill(~choice.keep, 0)


# It can choose while it eliminates where the set to choose from is known before its columns are reached.
@UPDATES.register(
    reference="https://arxiv.org/abs/2301.00774",
    reads="gram",
    chooses=True,
    criterion="obs",
    kinds=("group", "n:m", "mixed"),
)
@torch.no_grad()
def sparsegpt(weight: Tensor, statistics: LayerStatistics, choice: Choice) -> Tensor:
    """The pruned weight whose kept entries make up, column by column, for the removed ones.

    `statistics` need `gram`, (in_features, in_features). Without `choice.keep`, the weights to remove are the lowest
    of (w / U_jj)² at the moment when their group of columns is reached, U being the upper Cholesky factor of (X Xᵀ +
    damping)⁻¹. Weights of inputs that never fired go first: they multiply nothing, whatever their size (the published
    code sets them to zero).

    Returns float32. The updates of 128 columns (or one group) are applied to the rest at once, which changes the speed
    and not the result.

    Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774, algorithm 1.
    """
    factor, dead = statistics.inverse_factor(choice.damping).factor, statistics.dead
    pattern = choice.pattern
    # transposed, so that each column lies together in memory
    new = weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    columns = len(new)
    width = pattern.width if pattern.kind == "group" else 128
    neighbours = removed = 0
    # No group of M may lie across two blocks: it is chosen at once, from updated weights.
    if pattern.in_groups:
        width = max(width // pattern.width, 1) * pattern.width
    if pattern.in_groups and choice.keep is None:
        neighbours = pattern.width
        removed = (
            pattern.width - pattern.kept if pattern.kept else round(choice.count * pattern.width / weight.numel())
        )
    eliminate = elimination_on(new.device, min(width, columns), neighbours)
    # What may stay: with N:M the rest is chosen on the way, with groups the number of each is known before.
    stays = choice.keep if choice.gone is None or choice.keep is not None else ~choice.gone
    numbers = (
        None if choice.gone is None or pattern.kind != "group" else numbers_of_sets(pattern, choice.gone, choice.count)
    )
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, upper = new[start:stop], factor[start:stop, start:stop]
        keep = None if stays is None else stays[:, start:stop]
        if pattern.kind == "group" and choice.keep is None:
            scores = (block / upper.diagonal()[:, None]).square_().masked_fill_(dead[start:stop, None], 0)
            here = count_in_columns(choice.count, columns, start, stop)
            if keep is not None:
                scores, here = scores.masked_fill_(~keep.t(), -1), int(numbers[start // width])
            keep = Pattern("matrix").keep(scores.t(), here)
        errors = eliminate(block, upper, dead[start:stop], keep, neighbours, removed)
        # One product for all later columns, instead of a rank-one update per column.
        new[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return new.t()
