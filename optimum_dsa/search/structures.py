"""Candidates -> how much of every unit of structures goes: what `Resolver` is for single weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from ..pruning.allocation import Allocation
from ..pruning.structured.budget import fitted_counts
from ..pruning.structured.configuration import DSAStructuredConfig
from ..pruning.structured.widths.dense import allocation_of
from ..pruning.structured.widths.shares import SHARES, allocator_of, shares
from .realise.structures import StructureWidths
from .space import Candidate


class StructureResolver:
    """Allocations of candidates, in the cost of the budget: a unit's counts are multiples of what a structure costs.

    A candidate may stand between them, so that strategies can move small amounts; what is looked at is whole.

    Args:
        named: allocations that will be tried.
    """

    def __init__(self, realised: StructureWidths, config: DSAStructuredConfig, named: Sequence[str] = ()):
        self.realised, self.config, self.dense = realised, config, realised.dense
        self.sizes = realised.sizes
        self.steps = tuple(realised.steps.values())
        self.low = (0,) * len(self.sizes)
        self.high = tuple(self.dense.sizes[unit].most * cost for unit, cost in realised.cost.items())
        self.kinds = {unit: each.kind for unit, each in realised.units.items()}
        self.units = {"block": {unit: (unit,) for unit in self.sizes}}
        self._proposed = lru_cache(maxsize=None)(self._propose)
        self._whole = lru_cache(maxsize=4096)(self._removed)
        # Those that look at matrices look at them in one walk.
        self.dense.measure({name: allocator_of(name) for name in named if name not in SHARES})

    def counts(self, candidate: Candidate) -> tuple[int, ...]:
        """What to take of every unit, in the model's order; together of the budget, or less than a step below it.

        Raises:
            ValueError: the candidate has no allocation.
        """
        if candidate.counts is not None:
            return candidate.counts
        proposed, offsets = self._proposed(candidate.function, candidate.spread), dict(candidate.offsets)
        return self.fit({unit: share + offsets.get(self.kinds[unit], 0.0) for unit, share in proposed.items()})

    def removed(self, candidate: Candidate) -> tuple[int, ...]:
        """What prune takes where the candidate's counts are asked for: whole structures."""
        return self._whole(self.counts(candidate))

    def fit(self, proposed: dict[str, float]) -> tuple[int, ...]:
        """The counts nearest to a wished-for share of every unit."""
        sizes = {unit: self.dense.sizes[unit] for unit in self.sizes}
        found = fitted_counts(sizes, self.dense.asked, proposed, self.config.cost)
        return tuple(found[unit] * self.realised.cost[unit] for unit in self.sizes)

    def allocation(self, counts: Sequence[int], name: str) -> Allocation:
        """Counts as what a `DSAStructuredConfig` takes."""
        whole = dict(zip(self.sizes, self._whole(tuple(counts))))
        numbers = dict.fromkeys(self.dense.units, 0) | self.realised.numbers(whole)
        return allocation_of(self.dense.units, numbers, name)

    def predicted(self, allocation: Allocation) -> float | None:
        """What is lost by the units' error curves together; `None` where nobody has asked for these."""
        if "curves" not in self.dense.known:
            return None
        return sum(float(self.dense.curves[unit][number]) for unit, number in allocation.counts().items())

    def _removed(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        if not any(counts):
            return counts  # the dense model, from which scores are taken first
        return self.fit({unit: count / self.sizes[unit] for unit, count in zip(self.sizes, counts)})

    def _propose(self, name: str, spread: float | None) -> dict[str, float]:
        config = replace(self.config, allocation=name, spread=spread)
        found = shares(self.dense.under(config))
        return {unit: found[unit] for unit in self.sizes}
