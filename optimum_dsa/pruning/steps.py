"""What is done to a block while a walk stands at it: one `Step` after the other; the walk reads what they need.

for walked in walk_blocks(model, architecture, batches, reads=union(steps)):
    for step in steps:
        step(walked)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..common.ranks import ALONE, Ranks
from ..model.architecture import Weight
from ..model.left_dense import kind_of
from ..model.statistics import LayerStatistics
from ..model.walk import Reads, WalkedBlock
from .allocation import Allocation, split_count
from .owners import owners, spread
from .resolved_method import ResolvedMethod
from .zeros import zeros_in


logger = logging.getLogger(__name__)


class Step(Protocol):
    """Changes one walked block, in place.

    One that reads statistics by `walked.groups(true_sequential=True)` alone says so by `true_sequential = True`.

    A block that an interrupted prune finished is put back without asking its steps, and those after it have to become
    what they would have become. So a step changes nothing outside its block, and what it does follows from the block,
    the statistics, its settings and its notes: a generator is made anew for every block, and what is found at one
    block for later ones is looked up in the notes.

    Attributes:
        reads: what the walk has to collect for it: "inputs" (Σ x² of every weight's input), "mean" (Σ x as well),
            "gram" (X·Xᵀ as well), "cross_gram" (X_dense·Xᵀ as well), and with it "residual".
        notes: name of a weight or of a block -> a JSON value, such as what the report says of it. Those that are added
            at a block are kept with it, and put back with it.
        waiting: blocks that it was given and will change once more, together with the next; a step that never does so
            need not have it.
    """

    reads: Reads
    notes: dict[str, Any]

    def __call__(self, walked: WalkedBlock) -> None: ...


def union(steps: Sequence[Step]) -> Reads:
    """What a walk has to read so that every step has what it needs."""
    return frozenset().union(*(step.reads for step in steps))


class RemoveWeights:
    """Takes single weights out of every matrix of a block, as many as the allocation says, and updates the rest.

    Several processes (`ranks`), which have the same statistics, divide the matrices.

    Attributes:
        damping: weights whose X·Xᵀ needed more damping than asked -> the damping that it took.
        unseen: weights that no calibration token reached.
        unpaired: weights that were to be fitted to the dense model's outputs, which could not be had, and were fitted
            to their own.
    """

    def __init__(
        self, method: ResolvedMethod, allocation: Allocation, true_sequential: bool = False, ranks: Ranks = ALONE
    ):
        self.method, self.allocation, self.ranks = method, allocation, ranks
        self.true_sequential = true_sequential
        self.reads: Reads = method.reads
        self.notes: dict[str, Any] = {}  # weight -> its "damping", whether it was "unseen" or "unpaired"

    @property
    def damping(self) -> dict[str, float]:
        return {name: noted["damping"] for name, noted in self.notes.items() if "damping" in noted}

    @property
    def unseen(self) -> list[str]:
        return [name for name, noted in self.notes.items() if "unseen" in noted]

    @property
    def unpaired(self) -> list[str]:
        return [name for name, noted in self.notes.items() if "unpaired" in noted]

    def log(self, weights: Sequence[Weight]) -> None:
        """Say of how many of the model's `weights` the dense model's targets could not be had."""
        if found := set(self.unpaired):
            share = sum(weight.size for weight in weights if weight.name in found) / sum(each.size for each in weights)
            kinds = sorted(set(map(kind_of, found)))
            logger.warning(
                "%d of %d matrices (%.0f %% of their weights) were fitted to their own outputs, as they are not given "
                "the tokens that they have in the dense model (routed experts): %s.",
                *(len(found), len(weights), 100 * share, ", ".join(kinds)),
            )

    @torch.no_grad()
    def __call__(self, walked: WalkedBlock) -> None:
        counts, groups = shares(walked, self.allocation, self.method), walked.groups(self.true_sequential)
        # Behind every group what comes next is collected, or all groups are divided at once.
        for part in ([group] for group in groups) if self.ranks.alone or self.true_sequential else [list(groups)]:
            owner = {} if self.ranks.alone else owners(part, self.ranks, "gram" in self.reads)
            for group in part:
                for weight in group.weights:
                    if owner.get(weight.name, self.ranks.index) == self.ranks.index:
                        self._prune(walked, weight, group.statistics.get(weight.name), counts[weight.name])
                    walked.changed(weight)
                    walked.done(weight, group)
            if owner:
                spread(walked, part, owner, self.notes, self.ranks)

    def _prune(self, walked: WalkedBlock, weight: Weight, statistics: LayerStatistics | None, count: int) -> None:
        """Prune the live `weight` of a block, (out_features, in_features), in place."""
        tensor = walked.tensor(weight)
        # Into the live weight, in its dtype: ties, views and offloaded storage stay what they are.
        pruned = self.method.of_weight(weight.name).pruned(tensor, statistics, count)
        # In its dtype before: what becomes zero there has no number.
        tensor.copy_(self.method.on_grid(pruned.to(tensor.dtype), statistics))
        if statistics is not None:
            self._note(weight.name, statistics)

    def _note(self, name: str, statistics: LayerStatistics) -> None:
        noted: dict[str, Any] = {"unseen": True} if statistics.tokens == 0 else {}
        if "cross_gram" in self.reads and statistics.tokens and not statistics.is_paired:
            noted["unpaired"] = True
        # Only what was raised: the damping that was asked for stands in the config.
        if (used := statistics.damping_used) and used > self.method.damping:
            noted["damping"] = used
        if noted:
            self.notes[name] = noted


def shares(walked: WalkedBlock, allocation: Allocation, method: ResolvedMethod) -> Mapping[str, int]:
    """Weight -> how many of its entries go: each unit's number, divided over its matrices by their size.

    Of a block that is as it was before: a matrix that has more zeros than its share keeps them.
    """
    found, counts = {}, allocation.counts()
    for unit, weights in walked.block.units(allocation.granularity).items():
        floors = {}
        if method.keeps_zeros_in_number:
            floors = {weight.name: zeros_in(walked.tensor(weight)) for weight in weights}
        found |= split_count(counts[unit], {weight.name: weight.size for weight in weights}, floors)
    return found
