"""Allocations of single weights: masks from the order in which the weights of each matrix would go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...common.progress import progress
from ...model.activations import held_in
from ...model.architecture import Architecture, Weight
from ...model.gradients import collect_gradients
from ...model.statistics import LayerStatistics
from ...model.walk import WalkedBlock, walk_blocks
from ...pruning.allocate import fit_to_pattern
from ...pruning.allocation import Allocation
from ...pruning.calibration import Calibration
from ...pruning.configuration import DSAConfig
from ...pruning.resolved_method import ResolvedMethod
from ...pruning.unstructured.patterns import Pattern, removal_order
from .masked_model import MaskedModel, quantise
from .realisation import REALISATIONS


# Calibration tokens that scores at an anchor are taken from: enough to rank candidates, a quarter of the time of all.
# An update fits what it keeps to the tokens that it sees, and the finalists' sequential prune is final: they read all.
ANCHOR_TOKENS = 8192
# Half the width, as a share of the matrix, of the stretch of the order along which a slope is taken.
BAND = 0.04


class Masks:
    """The `Realisation` of unstructured and N:M pruning: the model with masks, made afresh in every forward pass.

    From the scores at an *anchor*, a sparse point whose activations they are taken from, follows per matrix the order
    in which its weights go: it holds the masks of all sparsities. The weights themselves are never changed.

    Args:
        calibration: feeds statistics.
        config: method, pattern, bounds, batch size.
    """

    def __init__(
        self, model: nn.Module, architecture: Architecture, calibration: Calibration | None, config: DSAConfig
    ):
        self.model, self.architecture, self.calibration, self.config = model, architecture, calibration, config
        self.masked = MaskedModel(model, architecture)
        self.method = config.resolved
        self.sizes = {weight.name: weight.size for weight in architecture.weights}
        self.steps = {name: _step(self.method.pattern, size) for name, size in self.sizes.items()}
        self.anchor: Mapping[str, int] | None = None
        self._anchored = False
        self._gradients: Mapping[str, Tensor] | None = None  # of the dense model: the same at every anchor
        # at the anchor: weight -> how an update changes it from a little fewer removed to a little more, and how many
        self._changes: dict[str, tuple[Tensor, int]] = {}

    def fitted(self, allocation: Allocation) -> Allocation:
        """What `prune` would make of an allocation: the pattern may need whole N."""
        return fit_to_pattern(allocation, self.config)

    def move_anchor(self, counts: Mapping[str, int] | None) -> None:
        """Take scores from the activations of the model pruned to `counts`, block after block; `None`: the dense."""
        self.anchor, self._anchored = counts, False

    @contextmanager
    def at(self, counts: Mapping[str, int]) -> Iterator[None]:
        """The model with masks that remove `counts`, from the scores at the anchor."""
        self._ensure_anchor()
        self.masked.counts = counts
        with self.masked.active():
            yield

    @contextmanager
    def slopes(self, counts: Mapping[str, int], band: float = BAND) -> Iterator[dict[str, float]]:
        """As `at`; yields per matrix how fast the loss rises as one more weight is removed, filled by backward passes.

        The loss's linearisation g · dW along the path of pruned matrices, from `band` of the matrix below the count to
        `band` above it. Without an update, dW is −w of the weights whose turn comes there, kept and removed alike;
        with one, the difference of the matrices pruned to both ends at the anchor. g is the gradient at the sparse
        point: at the dense point it would vanish.
        """
        self._ensure_anchor(band)
        self.masked.counts = counts
        slopes = dict.fromkeys(self.sizes, 0.0)

        def receive(weight, gradient: Tensor) -> None:
            """Add the slope of one weight, from its gradient, (out_features, in_features)."""
            if weight.name in self._changes:
                change, number = self._changes[weight.name]
                slopes[weight.name] += (gradient.float() * change.to(gradient.device)).sum().item() / number
                return
            width = max(int(band * weight.size), self.steps[weight.name])
            near = self.masked.band(weight.name, counts[weight.name], width).to(gradient.device)
            moved = (gradient.float() * self.masked.value(weight.name).float()).masked_select(near)
            slopes[weight.name] -= moved.sum().item() / max(moved.numel(), 1)

        with self._backward(receive):
            yield slopes

    @contextmanager
    def _backward(self, receive: Callable[[Weight, Tensor], None]) -> Iterator[None]:
        """The model with masks, for backward passes that `receive` (weight, gradient)."""
        flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            # Only the masked copies need gradients: those of all parameters would be another model in memory.
            for parameter in flags:
                parameter.requires_grad_(False)
            with torch.enable_grad(), self.masked.active(), self.masked.gradients(receive):
                yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def errors(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Raises `ValueError`: an order tells which weights go, and not what is lost with them."""
        raise ValueError("Masks have no error curves; search with realisation='database'.")

    @contextmanager
    def pruned(self, counts: Mapping[str, int]) -> Iterator[None]:
        """The model as `prune` would leave it: its own masks and updates, each block after the pruned ones."""
        self._forget()
        try:
            with self.masked.active():
                self._prune(counts)
                yield
        finally:
            self._forget()

    @torch.no_grad()
    def _prune(self, counts: Mapping[str, int]) -> None:
        """The very masks of a prune and, where an update is used, what it makes of the kept weights."""
        for walked in self._walk(self.config.sequential, sys.maxsize, shown("Pruning a finalist"), True):
            for group in walked.groups(self.config.update.true_sequential):
                for weight in group.weights:
                    tensor, statistics = walked.tensor(weight), group.statistics.get(weight.name)
                    method = self.method.of_weight(weight.name)
                    new = method.pruned(tensor, statistics, counts[weight.name]).to(tensor.dtype)
                    self.masked.exact[weight.name] = new != 0
                    if method.updates:
                        self.masked.values[weight.name] = new
                    walked.done(weight, group)

    @torch.no_grad()
    def _ensure_anchor(self, band: float = 0.0) -> None:
        """Have the orders, values and, where an update is used, changes over `band` at the anchor."""
        # Changes cost two more prunes of every matrix; only slopes with an update need them.
        if self._anchored and (self._changes or not (self.method.updates and band and self.anchor)):
            return
        self._forget()
        self.masked.counts = self.anchor or {}
        tokens = sys.maxsize if self.method.updates else ANCHOR_TOKENS
        with self.masked.active():
            for walked in self._walk(self.config.sequential and self.anchor is not None, tokens):
                self._order(walked, band)
        self._anchored = True

    def _order(self, walked: WalkedBlock, band: float) -> None:
        """The removal orders of a block's weights and, where an update is used, values and changes."""
        for weight in walked.weights:
            tensor, statistics = walked.tensor(weight), walked.statistics.get(weight.name)
            count = self.masked.counts.get(weight.name, 0)
            method = self.method.of_weight(weight.name)
            scores = method.metric(tensor, statistics)
            if count and method.updates:
                if band:
                    width = max(int(band * weight.size), self.steps[weight.name])
                    self._changes[weight.name] = _change(tensor, statistics, method, count, width)
                new = method.pruned(tensor, statistics, count).to(tensor.dtype)
                gone = new == 0
                # Under the mask stands the old weight: at a smaller count it comes back.
                self.masked.values[weight.name] = torch.where(gone, tensor, new)
                # what the update has chosen goes first, whatever its score was before
                scores -= gone * (scores.max() + 1)
            self.masked.orders[weight.name] = quantise(removal_order(self.method.pattern, scores))

    @torch.no_grad()
    def _walk(
        self, sequential: bool, tokens: int, shown: Callable = iter, grouped: bool = False
    ) -> Iterator[WalkedBlock]:
        """The blocks, on the first `tokens`; `grouped`: whoever is given one goes through its groups, as `prune` does.

        Then, with `true_sequential`, nothing is collected of a group before its turn.
        """
        batches = None
        wanted = self.method.reads | self.method.metric_reads
        self._ensure_gradients(wanted)
        if wanted:
            batches = first_of(self.calibration.batches(self.config.batch_size), tokens)
        # On the dense model's activations nothing has drifted from them.
        reads = wanted if sequential else wanted - {"cross_gram", "residual"}
        yield from walk_blocks(
            self.model,
            self.architecture,
            batches,
            reads=reads,
            sequential=sequential,
            progress=shown,
            true_sequential=grouped and self.config.update.true_sequential,
            as_dense=self.masked.suspended,
            held=held_in(self.config.activations),
            gradients=self._gradients,
        )

    def _ensure_gradients(self, wanted: Collection[str]) -> None:
        """Have the gradients of the dense model's loss, if they are among what is wanted."""
        if "gradients" in wanted and self._gradients is None:
            with self.masked.suspended():
                whole = self.calibration.batches(self.config.batch_size)
                self._gradients = collect_gradients(self.model, self.architecture, whole)

    def _forget(self) -> None:
        """Give up what is known at the anchor: it is as large as the model."""
        self._anchored, self._changes = False, {}
        self.masked.orders, self.masked.values, self.masked.exact, self.masked.counts = {}, {}, {}, {}
        self.masked.solved = {}


REALISATIONS.add("masks", Masks, proxy="one-shot masks")


def shown(description: str) -> Callable:
    """What shows the progress of a walk over blocks."""
    return lambda blocks: progress(blocks, description, "block", "optimum_dsa.search")


def _step(pattern: Pattern, size: int) -> int:
    """The least by which a matrix of so many weights changes: one weight, or one of every group."""
    return size // pattern.width if pattern.in_groups else 1


def _change(
    tensor: Tensor, statistics: LayerStatistics | None, method: ResolvedMethod, count: int, width: int
) -> tuple[Tensor, int]:
    """What a matrix becomes with `width` weights more removed than `count`, less what it is with `width` less.

    (out_features, in_features) in bfloat16, as it is only ever summed over; and how many weights lie between both.
    """
    fewer, more = max(count - width, 0), min(count + width, tensor.numel())
    change = method.pruned(tensor, statistics, more) - method.pruned(tensor, statistics, fewer)
    return change.bfloat16(), more - fewer


def first_of(batches: Sequence[Mapping[str, Tensor]], tokens: int) -> list[Mapping[str, Tensor]]:
    """As many batches, (samples, length, ...) by name, as hold `tokens`, at least one."""
    taken: list[Mapping[str, Tensor]] = []
    for batch in batches:
        if tokens <= 0:
            break
        taken.append(batch)
        tokens -= next(iter(batch.values())).shape[:2].numel()
    return taken
