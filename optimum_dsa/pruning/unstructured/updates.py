"""Weight updates: what the kept weights become once the others are gone.

An update is (weight, statistics, `Choice`) -> new weight, (out_features, in_features), with exact zeros. It never
changes its arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...model.statistics import LayerStatistics
from .admm import admm
from .choice import UPDATES, Choice
from .dsnot import dsnot
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
    # transposed, so that each column lies together in memory
    new = weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    columns = len(new)
    width = choice.pattern.width if choice.pattern.kind == "group" else 128
    # No group of M may lie across two blocks: it is chosen at once, from updated weights.
    if choice.pattern.in_groups:
        width = max(width // choice.pattern.width, 1) * choice.pattern.width
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, upper = new[start:stop], factor[start:stop, start:stop]
        keep_column = _chooser(block.t(), upper, dead[start:stop], choice, start, columns)
        errors = torch.empty_like(block)
        for j in range(stop - start):
            kept = keep_column(j)
            # What was removed, over U_jj: the error that the columns behind make up for.
            torch.div(block[j], upper[j, j], out=errors[j]).masked_fill_(kept, 0)
            block[j:].addr_(upper[j, j:], errors[j], alpha=-1)
            # The update leaves roundings near zero here; zeros are exact.
            block[j].masked_fill_(~kept, 0)
        # One product for all later columns, instead of a rank-one update per column.
        new[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return new.t()


def _chooser(
    block: Tensor, upper: Tensor, dead: Tensor, choice: Choice, start: int, columns: int
) -> Callable[[int], Tensor]:
    """A function from a column of `block`, which begins at column `start` of `columns`, to the rows that it keeps.

    `block` is (out_features, width), `upper` (width, width), `dead` (width,) bool.
    """
    stop = start + block.shape[1]
    if choice.keep is not None:
        fixed = choice.keep[:, start:stop]
        return lambda j: fixed[:, j]
    pattern, diagonal = choice.pattern, upper.diagonal()
    if pattern.kind == "group":
        here = count_in_columns(choice.count, columns, start, stop)
        chosen = Pattern("matrix").keep((block / diagonal).square_().masked_fill_(dead, 0), here)
        return lambda j: chosen[:, j]
    chosen = torch.ones_like(block, dtype=torch.bool)
    per_group = round(choice.count * pattern.width / columns)

    def keep_of_the_group(j: int) -> Tensor:
        """Rows that keep column j, (out_features,) bool."""
        # At the first column of a group: all of it is chosen from the weights as they are by then.
        if j % pattern.width == 0:
            group = slice(j, j + pattern.width)
            scores = (block[:, group] / diagonal[group]).square_().masked_fill_(dead[group], 0)
            chosen[:, group] = pattern.keep(scores, per_group)
        return chosen[:, j]

    return keep_of_the_group
