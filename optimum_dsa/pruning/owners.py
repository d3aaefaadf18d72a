"""Which process prunes which matrix of a block, and how all of them come to have all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..common.ranks import Ranks
from ..model.architecture import Weight
from ..model.walked import Group, WalkedBlock


def owners(groups: Sequence[Group], ranks: Ranks, solves: bool) -> dict[str, int]:
    """Weight -> the process that prunes it: the most work first, each to who has least to do then.

    Groups stay whole where that is as fast; the matrices of one part where it is faster.

    Args:
        solves: whether an update works on X·Xᵀ, whose factor each process makes that has a weight of the group.
    """
    rows = [[(weight, number) for weight in group.weights] for number, group in enumerate(groups)]
    whole = _divided(rows, ranks, solves)
    apart = _divided([[row] for group in rows for row in group], ranks, solves)
    return min(whole, apart, key=lambda found: found[0])[1]


def _divided(
    parts: Sequence[Sequence[tuple[Weight, int]]], ranks: Ranks, solves: bool
) -> tuple[float, dict[str, int]]:
    """The work of who has most to do, and weight -> process, of parts of (weight, its group) that stay together."""
    loads, begun = [0.0] * ranks.count, [set() for _ in range(ranks.count)]
    found: dict[str, int] = {}

    def work(part: Sequence[tuple[Weight, int]], rank: int) -> float:
        if not solves:
            return sum(weight.size for weight, _ in part)
        columns = part[0][0].shape[1]
        return sum(weight.size * columns for weight, _ in part) + (part[0][1] not in begun[rank]) * columns**3

    for part in sorted(parts, key=lambda part: -work(part, 0)):
        rank = min(range(ranks.count), key=lambda rank: loads[rank] + work(part, rank))
        loads[rank] += work(part, rank)
        begun[rank].add(part[0][1])
        found |= {weight.name: rank for weight, _ in part}
    return max(loads), found


def spread(
    walked: WalkedBlock, groups: Sequence[Group], owner: Mapping[str, int], notes: dict[str, Any], ranks: Ranks
) -> None:
    """Make the weights of `groups` on all processes what their owners made of them, and `notes` what they noted."""
    weights = [weight for group in groups for weight in group.weights]
    own = {weight.name: notes.pop(weight.name) for weight in weights if weight.name in notes}
    told = ranks.gather({name: noted for name, noted in own.items() if owner[name] == ranks.index})
    found = {name: noted for each in told for name, noted in each.items()}
    notes |= {weight.name: found[weight.name] for weight in weights if weight.name in found}
    for weight in weights:
        ranks.broadcast_(walked.tensor(weight), owner[weight.name])
