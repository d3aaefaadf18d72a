"""A step in front of pruning to N:M: channels in another order, so that groups of M hold what can be spared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..model.architecture import Weight
from ..model.coupling import ChannelSet, Coupling, find_couplings, outputs_of, reorder_
from ..model.walk import Reads, WalkedBlock
from .allocation import Allocation
from .resolved_method import ResolvedMethod
from .steps import shares
from .unstructured.permutations import PERMUTATIONS, Channels, retained


logger = logging.getLogger(__name__)

# How far, relative to their norm, outputs may move that are summed in another order: a wrong order moves them by as
# much as they are.
TOLERANCE, OF_DTYPE = 1e-4, 8


class Permute:
    """Puts the channels between coupled matrices of a block in an order in which N:M costs less of the score.

    The rows of gate and up, or of v within a head, move with the columns of down, or of o: the block computes what it
    did, and its checkpoint is an ordinary one. Outputs on a sample are compared before and after, and where they
    differ by more than rounding does, the order is undone.

    Attributes:
        permuted: weights whose columns were moved -> the share of their score that the pattern leaves, before and
            after.
        left: weights whose columns stayed where they were -> why.
    """

    def __init__(self, method: ResolvedMethod, allocation: Allocation, permutation: str):
        self.method, self.allocation = method, allocation
        self.choose = PERMUTATIONS[permutation]
        self.by_errors = PERMUTATIONS.fact(permutation, "reads", "inputs") == "gram"
        self.reads: Reads = method.reads
        self.notes: dict[str, Any] = {}  # weight -> the two shares of its score, or why it stays

    @property
    def permuted(self) -> dict[str, tuple[float, float]]:
        return {name: tuple(noted) for name, noted in self.notes.items() if not isinstance(noted, str)}

    @property
    def left(self) -> dict[str, str]:
        return {name: noted for name, noted in self.notes.items() if isinstance(noted, str)}

    @torch.no_grad()
    def __call__(self, walked: WalkedBlock) -> None:
        if walked.run is None:
            self.notes |= {weight.name: "outside the blocks" for weight in walked.weights}
            return
        counts = shares(walked, self.allocation, self.method)
        couplings, left = find_couplings(walked)
        self.notes |= left
        for coupling in couplings:
            self._permute(walked, coupling, {weight.name: counts[weight.name] for weight in coupling.consumers})

    def log(self) -> None:
        """Name what stayed where it was, by reason; a warning where all did."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            logger.info("Columns of %d weights stay where they are (%s): %s.", len(names), why, ", ".join(names))
        if not self.permuted:
            logger.warning("No channels were put in another order: %s.", "; ".join(reasons))

    def _permute(self, walked: WalkedBlock, coupling: Coupling, counts: dict[str, int]) -> None:
        """Move the channels of one coupling, whose consumers lose `counts` weights, where that gains anything."""
        why = self._try(walked, coupling, counts)
        if why is not None:
            self.notes |= dict.fromkeys(counts, why)

    def _try(self, walked: WalkedBlock, coupling: Coupling, counts: dict[str, int]) -> str | None:
        """Move the channels; or why they stay where they are."""
        width = self.method.pattern.width
        kept = {width - round(counts[weight.name] * width / weight.size) for weight in coupling.consumers}
        usable = [_in_whole_groups(places, width) for places in coupling.sets]
        if not any(usable):
            return f"channels that can change places do not fill groups of {width}"
        if len(kept) > 1:
            return "matrices that share their inputs lose different shares"
        if kept & {0, width}:
            return "nothing or all of every group goes"
        names = [weight.name for weight in coupling.consumers]
        found = [self._scores(walked, weight) for weight in coupling.consumers]
        before = [retained(scores, *kept, width) / scores.sum().item() for scores in found]
        orders = [
            self._order(walked, coupling, found, places.columns, *kept)
            if use
            else torch.arange(places.columns.shape[1])
            for places, use in zip(coupling.sets, usable)
        ]
        orders = [order.to(places.columns.device) for places, order in zip(coupling.sets, orders)]
        del found
        if all(bool((order.diff() == 1).all()) for order in orders):
            return "no order that was found keeps more"
        if not _moved(walked, coupling, orders):
            logger.warning("%s: another order of channels changes what the block gives; left as is.", ", ".join(names))
            return "the block gave something else in another order"
        walked.rewritten()
        for weight, share in zip(coupling.consumers, before):
            scores = self._scores(walked, weight)
            self.notes[weight.name] = [share, retained(scores, *kept, width) / scores.sum().item()]
        return None

    def _scores(self, walked: WalkedBlock, weight: Weight) -> Tensor:
        """(out_features, in_features), by which the pattern would choose."""
        statistics = walked.statistics[weight.name]
        return self.method.metric(self.method.target(walked.tensor(weight), statistics), statistics)

    def _order(
        self, walked: WalkedBlock, coupling: Coupling, scores: Sequence[Tensor], columns: Tensor, kept: int
    ) -> Tensor:
        """The order of one set's channels, (size,), whose `columns` are (copies, size); as it is where none is better.

        Whoever reads the same channels has to take them in the same order: all are judged together. `scores` are those
        of the coupling's consumers, (out_features, in_features) each.
        """
        columns = columns.to(scores[0].device)
        channels = Channels(
            torch.cat([one[:, own] for own in columns for one in scores]), kept, self.method.pattern.width
        )
        if self.by_errors:
            weights = [walked.tensor(weight).float() for weight in coupling.consumers]
            moment = walked.statistics[coupling.consumers[0].name].second_moment
            channels = replace(
                channels,
                weights=torch.stack([torch.cat([weight[:, own] for weight in weights]) for own in columns]),
                # What the errors of different places have to do with each other is left out.
                moments=torch.stack([moment[own[:, None], own] for own in columns]),
            )
        order = self.choose(channels)
        here = torch.arange(columns.shape[1], device=columns.device)
        return order if channels.retained(order) > channels.retained() else here


def _moved(walked: WalkedBlock, coupling: Coupling, orders: Sequence[Tensor]) -> bool:
    """Whether the block gives the same with its channels in another order; if not, it is as it was."""
    before = outputs_of(walked, coupling.consumers)
    reorder_(walked, coupling, orders)
    after = outputs_of(walked, coupling.consumers)
    dtype = walked.tensor(coupling.consumers[0]).dtype
    allowed = max(TOLERANCE, OF_DTYPE * torch.finfo(dtype).eps)
    same = len(before) == len(after) and all(
        own.shape == other.shape and bool((own - other).norm() <= allowed * own.norm())
        for own, other in zip(before, after)
    )
    if not same:
        reorder_(walked, coupling, [order.argsort() for order in orders])
    return same


def _in_whole_groups(places: ChannelSet, width: int) -> bool:
    """Whether every `width` neighbours of the set are a whole group of the pattern, in every place that reads them."""
    if places.columns.shape[1] % width:
        return False
    groups = places.columns.div(width, rounding_mode="floor").unflatten(1, (-1, width))
    return bool((groups == groups[..., :1]).all())
