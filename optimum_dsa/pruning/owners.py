"""Which process prunes which matrix of a block, and how all of them come to have all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..common.ranks import Ranks
from ..model.architecture import Weight
from ..model.walked import Group, WalkedBlock


def owners(groups: Sequence[Group], ranks: Ranks, solves: bool) -> dict[str, int]:
    """Weight -> the process that prunes it: the most work first, each to who has least to do so far.

    Args:
        solves: whether an update works on X·Xᵀ, whose factor each process makes that has a weight of the group.
    """
    loads, begun = [0.0] * ranks.count, [set() for _ in range(ranks.count)]
    rows = [(weight, number) for number, group in enumerate(groups) for weight in group.weights]
    found: dict[str, int] = {}

    def work(weight: Weight, number: int, rank: int) -> float:
        columns = weight.shape[1]
        return weight.size * columns + (number not in begun[rank]) * columns**3 if solves else weight.size

    for weight, number in sorted(rows, key=lambda row: -work(*row, 0)):
        rank = min(range(ranks.count), key=lambda rank: loads[rank] + work(weight, number, rank))
        loads[rank] += work(weight, number, rank)
        begun[rank].add(number)
        found[weight.name] = rank
    return found


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
