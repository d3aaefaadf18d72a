"""How many structures go from every block, so that no more parameters go than were asked for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar


Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Available:
    """The structures of one kind in one block, as a budget sees them.

    Attributes:
        count: how many there are.
        cost: parameters of one.
        round_to: what stays is a multiple of it, where it is less than `count`.
        limit: how many may go at most; `None` for as many as can.
    """

    count: int
    cost: int
    round_to: int = 1
    limit: int | None = None

    @property
    def most(self) -> int:
        """How many can go at most: one stays, or as many as make a round number."""
        can = max(self.count - self.round_to, 0)
        return can if self.limit is None else min(can, self.limit)

    def allowed(self, number: float) -> int:
        """The largest number up to `number` that can go."""
        if number >= self.most:
            return self.most
        # What stays is rounded up, so that what goes is rounded down.
        stays = -(-(self.count - int(number)) // self.round_to) * self.round_to
        return max(self.count - stays, 0)

    def next(self, number: int) -> int:
        """The least number above `number` that can go; `number` where none is."""
        stays = (self.count - number - 1) // self.round_to * self.round_to
        return max(number, min(self.count - stays, self.most))


def uniform_counts(units: Mapping[Name, Available], asked: int) -> dict[Name, int]:
    """Unit -> how many go, the same share everywhere: together of at most `asked` parameters, and near to that.

    Raises:
        ValueError: with all gone that can, fewer parameters than `asked` are.
    """
    most = sum(unit.most * unit.cost for unit in units.values())
    if most < asked:
        raise ValueError(
            f"{asked:,} parameters are to go, and of the structures that may only {most:,} can; lower the sparsity "
            "(or round_to), or let other structures go as well."
        )
    share = asked / max(sum(unit.count * unit.cost for unit in units.values()), 1)
    counts = {name: unit.allowed(share * unit.count) for name, unit in units.items()}
    left = asked - sum(counts[name] * unit.cost for name, unit in units.items())
    while (near := _nearest_step(units, counts, left)) is not None:
        left -= (near[1] - counts[near[0]]) * units[near[0]].cost
        counts[near[0]] = near[1]
    return counts


def even_counts(kinds: Mapping[str, Hashable], units: Mapping[str, Available], asked: int) -> dict[str, int]:
    """`uniform_counts` with one number for all units of a kind, `kinds` telling which are of one."""
    together: dict[Hashable, Available] = {}
    for name, unit in units.items():
        known = together.get(kinds[name])
        together[kinds[name]] = replace(unit, cost=unit.cost + (known.cost if known else 0))
    counts = uniform_counts(together, asked)
    return {name: counts[kinds[name]] for name in units}


def _nearest_step(units: Mapping[Name, Available], counts: Mapping[Name, int], left: int) -> tuple[Name, int] | None:
    """The unit whose next step costs `left` at most and makes its share the smallest, and that step; or `None`."""
    steps = {name: unit.next(counts[name]) for name, unit in units.items()}
    able = [
        name for name, unit in units.items() if counts[name] < steps[name] <= counts[name] + left // max(unit.cost, 1)
    ]
    if not able:
        return None
    name = min(able, key=lambda name: steps[name] / units[name].count)
    return name, steps[name]
