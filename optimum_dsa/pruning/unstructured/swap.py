"""Exchanges of a kept and a removed weight of a row, each lowering the error of its output."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.statistics import LayerStatistics
from .choice import Choice
from .objective import row_errors


EXCHANGES = 100  # of a row, at most
CHUNK = 2**20  # pairs that are compared at once: bounds the memory
CANDIDATES = 16  # of a set, to go and to come back, whose pairs are compared
# Share of a row's first error by which an exchange has to lower it: less is rounding.
LEAST = 1e-6


@torch.no_grad()
def swap(weight: Tensor, statistics: LayerStatistics, choice: Choice) -> Tensor:
    """The weight with a better mask, nothing else changed: pairs are exchanged while ‖(w − ŵ) X‖² of their row falls.

    With e the removed part of row w, c = e X Xᵀ and d = diag(X Xᵀ), the error changes by w_u² d_u + 2 w_u c_u where u
    goes, by w_v² d_v − 2 w_v c_v where v comes back, and by −2 w_u w_v (X Xᵀ)_uv where both do. The best few of each
    kind are paired, and the best pair of a row is exchanged, up to `EXCHANGES` times. Both are of one row, and of one
    set of the pattern: count and pattern stay exact.

    Costs a product (out_features, in_features) · (in_features, in_features), and per exchange a pass over the weight.

    Returns (out_features, in_features) in the weight's dtype. Zimmer et al., 2025, "SparseSwaps",
    https://arxiv.org/abs/2512.10922, with candidates instead of all pairs.
    """
    moment, pattern = statistics.second_moment, choice.pattern
    width = weight.shape[1] if pattern.kind in ("row", "matrix") else min(pattern.width, weight.shape[1])
    # Of few neighbours all pairs are compared: as many for each weight as its set has.
    rows = max(CHUNK // (weight.shape[1] * min(width, CANDIDATES)), 1)
    # A weight that was zero before has nothing to bring back, and would be counted as removed all the same.
    never = weight == 0 if choice.gone is None else (weight == 0) | choice.gone
    parts = zip(weight.split(rows), choice.keep.split(rows), never.split(rows))
    return torch.cat([_swapped(part, moment, keep, never, width) for part, keep, never in parts])


def _swapped(weight: Tensor, moment: Tensor, keep: Tensor, never: Tensor, width: int) -> Tensor:
    """Some rows, (rows, columns), of `swap`, in sets of `width` neighbours; where `never` is True none comes back."""
    start, keep, values = weight.masked_fill(~keep, 0), keep.clone(), weight.float()
    missing = values.masked_fill(keep, 0)
    pull = missing @ moment
    least = torch.linalg.vecdot(missing, pull) * LEAST
    live = torch.arange(len(weight), device=weight.device)
    for _ in range(EXCHANGES):
        change, goes, comes = _best_pair(values[live], pull[live], keep[live], never[live], moment, width)
        better = change < -least[live]
        live, goes, comes = live[better], goes[better], comes[better]
        if not len(live):
            break
        keep[live, goes], keep[live, comes] = False, True
        gone, back = values[live, goes][:, None], values[live, comes][:, None]
        pull[live] += gone * moment[goes] - back * moment[comes]
    new = weight.masked_fill(~keep, 0)
    # The sums of many exchanges are rounded: the error itself has the last word.
    fell = row_errors(weight, new, moment) <= row_errors(weight, start, moment)
    return torch.where(fell[:, None], new, start)


def _best_pair(
    values: Tensor, pull: Tensor, keep: Tensor, never: Tensor, moment: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How the error of every row changes by its best exchange, which column goes and which comes back; (rows,) each.

    `values`, `pull`, `keep` and `never` are (rows, columns), `moment` is (columns, columns). A row without a pair has
    infinity.
    """
    alone, crossed = values.square() * moment.diagonal(), 2 * values * pull
    goes_cost, goes = _cheapest((alone + crossed).masked_fill_(~keep, torch.inf), width)
    comes_cost, comes = _cheapest((alone - crossed).masked_fill_(keep | never, torch.inf), width)
    crossing = moment[goes[..., None], comes[..., None, :]]
    goes, comes = goes.expand_as(goes_cost), comes.expand_as(comes_cost)
    gone, back = (values.gather(1, at.flatten(1)).view_as(at) for at in (goes, comes))
    pairs = (crossing * (-2 * gone[..., None])).mul_(back[..., None, :])
    pairs += goes_cost[..., None]
    pairs += comes_cost[..., None, :]
    change, best = pairs.flatten(1).min(dim=1)
    each = goes.shape[2]
    # (set, place among the candidates to go, place among those to come back)
    of_set, pair = best // each**2, best % each**2
    row = torch.arange(len(values), device=values.device)
    return change, goes[row, of_set, pair // each], comes[row, of_set, pair % each]


def _cheapest(costs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The lowest costs of every set of `width` columns, and their columns: (rows, columns) -> (rows, sets, some).

    Where a set is no more than the candidates, its columns are the same for all rows, (1, sets, some).
    """
    columns = costs.shape[1]
    # A last set that is short is filled with what is never chosen.
    padded = torch.nn.functional.pad(costs, (0, -columns % width), value=torch.inf).unflatten(1, (-1, width))
    places = torch.arange(padded.shape[1] * width, device=costs.device).view(1, -1, width)
    if width <= CANDIDATES:
        return padded, places.clamp_max_(columns - 1)
    lowest, at = padded.topk(CANDIDATES, dim=2, largest=False)
    return lowest, at.add_(places[..., :1]).clamp_max_(columns - 1)
