"""Which structures stay, by scores, so that no more parameters go than were asked for: the budget is met exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..budget import Available


class Projection:
    """Scores of structures, projected onto a budget.

    Args:
        sizes: unit -> what there is.
        asked: parameters that go, at most.
        counts: unit -> how many go, where that is settled; else the lowest scores of the whole model go.
    """

    def __init__(self, sizes: Mapping[str, Available], asked: int, counts: Mapping[str, int] | None = None):
        self.sizes, self.asked, self.settled = sizes, asked, counts

    def keep(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unit -> which structures stay, (structures,) bool: of `scores`, unit -> (structures,), the highest."""
        counts = self.settled or self.counts(scores)
        kept = {}
        for unit, score in scores.items():
            # Stable, so that of equals the first go, on every machine.
            kept[unit] = torch.ones_like(score, dtype=torch.bool)
            kept[unit][score.argsort(stable=True)[: counts[unit]]] = False
        return kept

    def counts(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Unit -> how many go where the lowest of all scores go, as long as they fit what was asked."""
        units = list(scores)
        # The best of a unit stay: as many as must.
        able = {unit: scores[unit].detach().float().cpu().sort().values[: self.sizes[unit].most] for unit in units}
        values = torch.cat([able[unit] for unit in units])
        owner = torch.cat([torch.full((len(able[unit]),), n) for n, unit in enumerate(units)])
        order = values.argsort(stable=True)
        costs = torch.tensor([self.sizes[unit].cost for unit in units])[owner[order]]
        fits = owner[order][costs.cumsum(0) <= self.asked]
        number = torch.bincount(fits, minlength=len(units)).tolist()
        counts = {unit: self.sizes[unit].allowed(number[n]) for n, unit in enumerate(units)}
        left = self.asked - sum(count * self.sizes[unit].cost for unit, count in counts.items())
        while (step := self._step(counts, able, left)) is not None:
            unit, count = step
            left -= (count - counts[unit]) * self.sizes[unit].cost
            counts[unit] = count
        return counts

    def _step(self, counts: Mapping[str, int], able: Mapping[str, Tensor], left: int) -> tuple[str, int] | None:
        """The unit whose next structures score lowest among those whose cost is `left` at most, and its new count."""
        steps = {}
        for unit, size in self.sizes.items():
            after = size.next(counts[unit])
            if counts[unit] < after and (after - counts[unit]) * size.cost <= left:
                steps[unit] = (able[unit][counts[unit] : after].mean().item(), after)
        if not steps:
            return None
        unit = min(steps, key=lambda unit: steps[unit][0])
        return unit, steps[unit][1]
