"""Allocations in steps: what mixed N:M can carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .budget import Allocation


def levels_within(levels: int, low: float, high: float) -> tuple[int, int]:
    """The least and the most k for which k / `levels` is in [low, high]."""
    # 0.29 · 100 and 0.07 · 100 miss their whole numbers by a rounding, to either side.
    return math.ceil(low * levels - 1e-9), math.floor(high * levels + 1e-9)


def fit_to_levels(
    allocation: Allocation,
    levels: int,
    low: float = 0.0,
    high: float = 1.0,
    cost: Mapping[str, float] | None = None,
) -> Allocation:
    """The allocation with every unit's sparsity rounded to k / `levels` within [low, high], for mixed N:M.

    The whole numbers k are chosen so that the weights removed are as near to the allocation's total as any choice of
    rounding each unit up or down can come: exactly that total whenever it can be met. Largest remainders are rounded
    up; of units with one and the same remainder those of least `cost`, and where no cost is known, units that are
    spread evenly over the model: the first blocks are those that can spare the least, and must not pay for all.

    Args:
        cost (`Mapping[str, float]`, *optional*): unit -> what one more step would cost there.

    Raises:
        ValueError: no k keeps the bounds, or all that do remove too much, or too little.
    """
    units = list(allocation.sizes)
    least, most = levels_within(levels, low, high)
    exact = {unit: min(max(allocation.sparsity[unit] * levels, least), most) for unit in units}
    level = {unit: min(int(exact[unit] + 1e-9), most) for unit in units}
    step = {unit: allocation.sizes[unit] / levels for unit in units}
    goal = sum(allocation.counts().values())
    _check_reach(allocation, levels, least, most, goal)
    level = _shifted(level, exact, step, goal, least, most)
    # Units of one size have one step, so that only the number of steps up per size matters for the sum.
    missing = goal - sum(level[unit] * step[unit] for unit in units)
    by_step: dict[float, list[str]] = {}
    for unit in units:
        if level[unit] < most:
            by_step.setdefault(step[unit], []).append(unit)
    numbers = _nearest_sum(missing, {size: len(group) for size, group in by_step.items()})
    for group, number in zip(by_step.values(), numbers):
        remainder = {unit: exact[unit] - level[unit] for unit in group}
        # The budget gives some units of one share a weight more than others: that is no other remainder.
        apart = 2 * levels / max(allocation.sizes[group[0]], 1) + 1e-9
        for unit in _largest(group, number, remainder, apart, cost):
            level[unit] += 1
    return replace(allocation, sparsity={unit: level[unit] / levels for unit in units})


def _check_reach(allocation: Allocation, levels: int, least: int, most: int, goal: int) -> None:
    total = sum(allocation.sizes.values())
    if least > most or not least * total / levels - 1 <= goal <= most * total / levels + 1:
        raise ValueError(
            f"A mean sparsity of {goal / max(total, 1):.4g} cannot be met in steps of 1/{levels} with every unit from "
            f"{least}/{levels} to {most}/{levels}; choose finer steps (a larger M) or another sparsity, or widen "
            "min_sparsity / max_sparsity."
        )


def _shifted(
    level: dict[str, int], exact: Mapping[str, float], step: Mapping[str, float], goal: int, least: int, most: int
) -> dict[str, int]:
    """Levels whose sum can be brought to `goal` by at most one step up each: clipping may have taken some away."""
    level = dict(level)
    while True:
        missing = goal - sum(level[unit] * step[unit] for unit in level)
        room = sum(step[unit] for unit in level if level[unit] < most)
        if missing > room + 1e-6 and any(value < most for value in level.values()):
            level = {unit: min(value + 1, most) for unit, value in level.items()}
        elif missing < -max(step.values(), default=0) / 2 and any(value > least for value in level.values()):
            unit = min((unit for unit in level if level[unit] > least), key=lambda unit: exact[unit] - level[unit])
            level[unit] -= 1
        else:
            return level


def _nearest_sum(goal: float, groups: Mapping[float, int]) -> tuple[int, ...]:
    """How many of each size, at most so many as there are, make a sum nearest to `goal`."""
    # The nearest sum may lie above the goal, by less than one step.
    slack = max(groups, default=0)
    reachable: dict[float, tuple[int, ...]] = {0.0: ()}  # sum -> how many of each size it is made of
    for size, count in groups.items():
        grown: dict[float, tuple[int, ...]] = {}
        for total, taken in reachable.items():
            for number in range(count + 1):
                if total + number * size <= goal + slack:
                    # One way to make a sum is enough, so that there are never more entries than different sums.
                    grown.setdefault(total + number * size, (*taken, number))
        reachable = grown or {total: (*taken, 0) for total, taken in reachable.items()}
    return reachable[min(reachable, key=lambda total: abs(total - goal))]


def _largest(
    group: Sequence[str],
    number: int,
    remainder: Mapping[str, float],
    apart: float,
    cost: Mapping[str, float] | None,
) -> list[str]:
    """The `number` units of largest remainder; of those less than `apart`, these of least cost, or spread evenly."""
    alike: list[list[str]] = []
    for unit in sorted(group, key=lambda unit: -remainder[unit]):
        if alike and remainder[alike[-1][0]] - remainder[unit] < apart:
            alike[-1].append(unit)
        else:
            alike.append([unit])
    chosen: list[str] = []
    for units in alike:
        units = [unit for unit in group if unit in units]  # in the model's order again, along which they are spread
        wanted = min(number - len(chosen), len(units))
        if cost is not None:
            chosen += sorted(units, key=lambda unit: cost[unit])[:wanted]
        else:
            # The middles of `wanted` equal stretches.
            chosen += [units[int((index + 0.5) * len(units) / wanted)] for index in range(wanted)]
    return chosen
