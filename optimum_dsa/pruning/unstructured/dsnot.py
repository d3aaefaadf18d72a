"""DSnoT: removed weights come back, and kept ones go, until the expected output is what it was."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.statistics import LayerStatistics
from .choice import Choice


EXCHANGES = 50  # of a row, at most, as in the published code


@torch.no_grad()
def dsnot(weight: Tensor, statistics: LayerStatistics, choice: Choice) -> Tensor:
    """The weight with a mask under which the expected output is nearer to what it was, nothing else changed.

    The error of row w is expected to be ε = Σ w_k E[x_k] over what is removed. What comes back is of ε's sign and
    first in w_k E[x_k] / Var[x_k]; what goes is of the other sign and last in |w_k|·‖x_k‖. Both bring ε nearer to 0,
    and exchanges end where its sign would change. Both are of one set of the pattern, so that count and pattern stay
    exact. The published code also stops at an |ε| that depends on the length of sequences, and with N:M asks no sign
    of what goes.

    Costs a few passes over the weight and two partial sorts; no X·Xᵀ.

    Returns (out_features, in_features) in the weight's dtype. Zhang et al., ICLR 2024, "Dynamic Sparse No Training",
    https://arxiv.org/abs/2310.08915.
    """
    mean, seen = statistics.mean, max(statistics.tokens, 1)
    # The squares of inputs that hardly vary are rounded: their difference can fall to zero, and below.
    variance = (statistics.squared_sum / seen - mean.square()).clamp_min_(torch.finfo(torch.float32).tiny)
    gains = weight.float() * mean  # what a weight adds to the expected output
    error = gains.masked_fill(choice.keep, 0).sum(dim=1, keepdim=True)
    gains *= error.sign()
    pattern, columns = choice.pattern, weight.shape[1]
    width = columns if pattern.kind in ("row", "matrix") else min(pattern.width, columns)
    back = (gains / variance).masked_fill_(choice.keep | (gains <= 0), -torch.inf)
    if choice.gone is not None:
        back.masked_fill_(choice.gone, -torch.inf)
    away = (weight.float().abs() * statistics.input_norm).masked_fill_(~choice.keep | (gains >= 0), torch.inf)
    first, comes = _extremes(back, width, largest=True)
    last, goes = _extremes(away, width, largest=False)
    first.masked_fill_(last.isinf(), -torch.inf)
    # The pairs of a row in the order in which the first comes back, and as many as leave ε its sign.
    first, order = first.sort(dim=1, descending=True, stable=True)
    order, possible = order[:, :EXCHANGES], first[:, :EXCHANGES] > -torch.inf
    comes, goes = comes.gather(1, order), goes.gather(1, order)
    nearer = (gains.gather(1, comes) - gains.gather(1, goes)).masked_fill_(~possible, 0).cumsum(dim=1)
    exchanged = possible & (nearer <= error.abs())
    # Pairs that are not exchanged write into a column that is cut off.
    keep = torch.nn.functional.pad(choice.keep, (0, 1))
    keep.scatter_(1, comes.masked_fill_(~exchanged, columns), True)
    keep.scatter_(1, goes.masked_fill_(~exchanged, columns), False)
    return weight.masked_fill(~keep[:, :columns], 0)


def _extremes(scores: Tensor, width: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The best of every set of `width` columns and their columns: (rows, columns) -> (rows, some) both."""
    worst = -torch.inf if largest else torch.inf
    # A last set that is short is filled with what is never exchanged.
    sets = torch.nn.functional.pad(scores, (0, -scores.shape[1] % width), value=worst).unflatten(1, (-1, width))
    found, at = sets.topk(min(EXCHANGES, width), dim=2, largest=largest)
    at += torch.arange(sets.shape[1], device=scores.device)[:, None] * width
    return found.flatten(1), at.flatten(1).clamp_max_(scores.shape[1] - 1)
