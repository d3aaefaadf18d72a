"""A step in front of pruning to N:M: channels in another order, so that groups of M hold what can be spared."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.architecture import Weight
from ..model.coupling import ChannelSet, Coupling, find_couplings, outputs_of, reorder_
from ..model.walk import Reads, WalkedBlock
from .allocation import Allocation
from .resolved_method import ResolvedMethod
from .steps import shares
from .unstructured.permutations import PERMUTATIONS, retained


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
        # At least the sums: a walk that runs nothing could not compare what comes out.
        self.reads: Reads = method.metric_reads | {"inputs"}
        self.permuted: dict[str, tuple[float, float]] = {}
        self.left: dict[str, str] = {}

    @torch.no_grad()
    def __call__(self, walked: WalkedBlock) -> None:
        if walked.run is None:
            self.left |= {weight.name: "outside the blocks" for weight in walked.weights}
            return
        counts = shares(walked, self.allocation)
        couplings, left = find_couplings(walked)
        self.left |= left
        for coupling in couplings:
            self._permute(walked, coupling, {weight.name: counts[weight.name] for weight in coupling.consumers})

    def _permute(self, walked: WalkedBlock, coupling: Coupling, counts: dict[str, int]) -> None:
        """Move the channels of one coupling, whose consumers lose `counts` weights, where that gains anything."""
        width = self.method.pattern.width
        kept = [width - round(counts[weight.name] * width / weight.size) for weight in coupling.consumers]
        names = [weight.name for weight in coupling.consumers]
        usable = [_in_whole_groups(places, width) for places in coupling.sets]
        if not all(usable):
            self.left |= dict.fromkeys(names, f"channels that can change places do not fill groups of {width}")
        if not any(usable) or kept[0] in (0, width):
            return
        scores = [self._scores(walked, weight) for weight in coupling.consumers]
        orders = [
            self._order(places, scores, kept) if use else torch.arange(places.columns.shape[1])
            for places, use in zip(coupling.sets, usable)
        ]
        orders = [order.to(places.columns.device) for places, order in zip(coupling.sets, orders)]
        if all(bool((order.diff() == 1).all()) for order in orders):
            return
        before = [retained(score, keep, width) / score.sum().item() for score, keep in zip(scores, kept)]
        del scores
        if not _moved(walked, coupling, orders):
            logger.warning("%s: another order of channels changes what the block gives; left as is.", ", ".join(names))
            self.left |= dict.fromkeys(names, "the block gave something else in another order")
            return
        walked.rewritten()
        for weight, keep, share in zip(coupling.consumers, kept, before):
            after = self._scores(walked, weight)
            self.permuted[weight.name] = share, retained(after, keep, width) / after.sum().item()

    def _scores(self, walked: WalkedBlock, weight: Weight) -> Tensor:
        """(out_features, in_features), by which the pattern would choose."""
        statistics = walked.statistics.get(weight.name)
        return self.method.metric(self.method.target(walked.tensor(weight), statistics), statistics)

    def _order(self, places: ChannelSet, scores: Sequence[Tensor], kept: Sequence[int]) -> Tensor:
        """The order of one set's channels, (size,); the one that they have where no other keeps more."""
        device, width = scores[0].device, self.method.pattern.width
        columns = places.columns.to(device)
        # Whoever reads the same channels has to take them in the same order: their rows are judged together.
        parts = [torch.cat([score[:, own] for own in columns]) for score in scores]
        order = self.choose(torch.cat(parts), kept[0], width)
        here, there = (
            sum(retained(part[:, way], keep, width) for part, keep in zip(parts, kept)) for way in (slice(None), order)
        )
        return order if there > here else torch.arange(len(order), device=device)


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
