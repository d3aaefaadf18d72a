"""How many structures go from every block, so that no more parameters go than were asked for."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar


Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Available:
    """The structures of one kind in one block, as a budget sees them.

    Attributes:
        count: how many there are.
        cost: of one, such as its parameters; of 0 none goes.
        round_to: what stays is a multiple of it, where it is less than `count`.
        limit: how many may go at most; `None` for as many as can.
        entire: whether all may go.
    """

    count: int
    cost: int
    round_to: int = 1
    limit: int | None = None
    entire: bool = False

    @property
    def most(self) -> int:
        """How many can go at most: one stays, or as many as make a round number, or none."""
        can = max(self.count - (0 if self.entire else self.round_to), 0) if self.cost else 0
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


def too_little(asked: int, most: int, what: str) -> str:
    """Why `asked` of a cost cannot go, with all structures gone that may, which cost `most`."""
    if not most:
        return (
            f"{asked:,} {what} are to go, and what may go has none of them; let other structures go as well, or fewer "
            "blocks stay whole (keep_first, keep_last)."
        )
    return (
        f"{asked:,} {what} are to go, and of the structures that may only {most:,} can; lower the share (or round_to, "
        "keep_first, keep_last), or let other structures go as well."
    )


def fitted_counts(
    units: Mapping[Name, Available], asked: int, proposed: Mapping[Name, float] | None = None, what: str = "parameters"
) -> dict[Name, int]:
    """Unit -> how many go: together of at most `asked` cost, and so near to it that not one more would fit.

    What units ask for is shifted by one constant, the largest that the budget allows; what is left then goes where a
    step leaves a unit nearest to what it asked for.

    Args:
        proposed (`Mapping[Name, float]`, *optional*): the share that every unit asks for; the same one by default.
        what: that is counted, for the error.

    Raises:
        ValueError: with all gone that can, less than `asked` is; or what a unit asks for is no number.
    """
    most = sum(unit.most * unit.cost for unit in units.values())
    if most < asked:
        raise ValueError(too_little(asked, most, what))
    proposed = dict.fromkeys(units, 0.0) if proposed is None else proposed
    if odd := [str(name) for name in units if not math.isfinite(proposed[name])]:
        raise ValueError(f"The allocation is not finite for {', '.join(odd[:5])}.")

    def shifted(shift: float) -> dict[Name, int]:
        return {name: unit.allowed((proposed[name] + shift) * unit.count) for name, unit in units.items()}

    low, high = -max(proposed.values(), default=0.0), 1 - min(proposed.values(), default=0.0)
    # Shares are told apart as float64 can: at the end no whole number lies between both.
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(number * units[name].cost for name, number in shifted(middle).items()) <= asked
        low, high = (middle, high) if fits else (low, middle)
    counts = shifted(low)
    left = asked - sum(counts[name] * unit.cost for name, unit in units.items())
    while (near := _nearest_step(units, counts, proposed, left)) is not None:
        left -= (near[1] - counts[near[0]]) * units[near[0]].cost
        counts[near[0]] = near[1]
    return counts


def even_counts(
    kinds: Mapping[str, Hashable], units: Mapping[str, Available], asked: int, what: str = "parameters"
) -> dict[str, int]:
    """`fitted_counts` of equal shares with one number for all units of a kind, `kinds` telling which are of one."""
    together: dict[Hashable, Available] = {}
    for name, unit in units.items():
        known = together.get(kinds[name])
        together[kinds[name]] = replace(unit, cost=unit.cost + (known.cost if known else 0))
    counts = fitted_counts(together, asked, what=what)
    return {name: counts[kinds[name]] for name in units}


def _nearest_step(
    units: Mapping[Name, Available], counts: Mapping[Name, int], proposed: Mapping[Name, float], left: int
) -> tuple[Name, int] | None:
    """The unit whose next step costs `left` at most and is nearest to its proposed share, and that step; or `None`."""
    steps = {name: unit.next(counts[name]) for name, unit in units.items()}
    # What costs nothing would go for nothing.
    able = [
        name
        for name, unit in units.items()
        if unit.cost and counts[name] < steps[name] <= counts[name] + left // unit.cost
    ]
    if not able:
        return None
    name = min(able, key=lambda name: steps[name] / units[name].count - proposed[name])
    return name, steps[name]
