"""How much a model loses: Kullback-Leibler divergence from its dense self on validation text."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..common.fences import has_device_map
from ..data import Calibration
from ..evaluation.perplexity import check_tokens
from ..model.statistics import LayerStatistics
from ..model.walk import walk_blocks
from ..pruning.allocate import architecture_for
from ..pruning.configuration import DSAConfig
from ..pruning.resolved_method import ResolvedMethod
from ..pruning.unstructured.patterns import removal_order
from .masking import MaskedModel, quantise


# Calibration tokens that scores at an anchor are taken from: enough to rank candidates, a quarter of the time of all.
# An update fits what it keeps to the tokens that it sees, and the finalists' sequential prune is final: they read all.
ANCHOR_TOKENS = 8192


class Objective:
    """Losses of candidates, as counts of weights to remove per matrix.

    Everything that does not depend on the candidate is made once: the dense model's `top` most probable next tokens
    and their log-probabilities at every position, and the removal order of every weight at an *anchor*, a sparse
    point whose activations the scores are taken from. The model itself is never changed.

    Args:
        model: a causal language model.
        calibration: feeds statistics.
        validation: LongTensor (windows, length): guides the choice, and nothing else.
        config: method, pattern, exclusions, batch size.
        top: next tokens per position that the divergence tells apart; the rest counts as one.
    """

    def __init__(
        self, model: nn.Module, calibration: Calibration | None, validation: Tensor, config: DSAConfig, top: int = 512
    ):
        check_tokens(validation, model)
        self.model, self.config = model, config
        self.calibration, self.validation = calibration, validation
        self.architecture = architecture_for(model, config)
        self.masked = MaskedModel(model, self.architecture)
        self.method = config.resolved
        self.pattern = self.method.pattern
        self.sizes = {weight.name: weight.size for weight in self.architecture.weights}
        self.anchor: Mapping[str, int] | None = None
        self._device = torch.device("cpu") if has_device_map(model) else model.device
        self._dense = self._dense_predictions(top)
        self._anchored = False
        # at the anchor: weight -> how an update changes it from a little fewer removed to a little more, and how many
        self._changes: dict[str, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def _dense_predictions(self, top: int) -> list[tuple[Tensor, Tensor]]:
        """Per window, log-probabilities (length, top) and token ids of the dense model's likeliest next tokens."""
        found = []
        for rows in self.validation.split(self.config.batch_size):
            logits = self._logits(rows).float()
            highest = logits.topk(min(top, logits.shape[-1]), dim=-1)
            values = highest.values - logits.logsumexp(-1, keepdim=True)
            small = torch.int32 if logits.shape[-1] > 2**15 else torch.int16
            found += list(zip(values.half().cpu(), highest.indices.to(small).cpu()))
        return found

    def _logits(self, rows: Tensor) -> Tensor:
        return self.model(input_ids=rows.to(self._device), use_cache=False).logits

    def move_anchor(self, counts: Mapping[str, int] | None) -> None:
        """Take scores from the activations of the model pruned to `counts`, block after block; `None`: the dense."""
        self.anchor, self._anchored = counts, False

    @torch.no_grad()
    def _ensure_anchor(self, tokens: int = ANCHOR_TOKENS, band: float = 0.0) -> None:
        """Have the orders, values and, where an update is used, changes over `band` at the anchor."""
        method, updates = self.method, self.method.updates
        if self._anchored and (self._changes or not (updates and band and self.anchor)):
            return
        if updates:
            tokens = sys.maxsize
        self._changes = {}
        batches = _first(self.calibration.batches(self.config.batch_size), tokens) if method.reads else None
        self.masked.orders, self.masked.values, self.masked.counts = {}, {}, self.anchor or {}
        with self.masked.active():
            for walked in walk_blocks(
                self.model, self.architecture, batches, reads=method.reads, sequential=self.anchor is not None
            ):
                for weight in walked.weights:
                    tensor, statistics = walked.tensor(weight), walked.statistics.get(weight.name)
                    count = self.masked.counts.get(weight.name, 0)
                    scores = method.metric(tensor, statistics)
                    if count and updates:
                        if band:
                            self._changes[weight.name] = _change(tensor, statistics, method, count, band)
                        new = method.pruned(tensor, statistics, count).to(tensor.dtype)
                        gone = new == 0
                        self.masked.values[weight.name] = torch.where(gone, tensor, new)
                        # what the update has chosen goes first, whatever its score was before
                        scores -= gone * (scores.max() + 1)
                    self.masked.orders[weight.name] = quantise(removal_order(self.pattern, scores))
        self._anchored = True

    @torch.no_grad()
    def loss(self, counts: Mapping[str, int], rows: range) -> float:
        """Mean divergence per token of the model with `counts` removed, on the validation windows `rows`."""
        self._ensure_anchor()
        self.masked.counts = counts
        total = 0.0
        with self.masked.active():
            for part in _parts(rows, self.config.batch_size):
                total += self._divergence(part).sum().item()
        return total / (len(rows) * self.validation.shape[1])

    def slopes(self, counts: Mapping[str, int], rows: range, band: float = 0.04) -> tuple[float, dict[str, float]]:
        """The loss, and per matrix how fast it rises as one more weight is removed.

        The loss's linearisation g · dW along the path of pruned matrices, from `band` of the matrix below the count to
        `band` above it. Without an update, dW is −w of the weights whose turn comes there, kept and removed alike;
        with one, the difference of the matrices pruned to both ends at the anchor. g is the gradient at the sparse
        point: at the dense point it would vanish.
        """
        self._ensure_anchor(band=band)
        self.masked.counts = counts
        slopes = dict.fromkeys(self.sizes, 0.0)
        length = self.validation.shape[1]

        def receive(weight, gradient: Tensor) -> None:
            if weight.name in self._changes:
                change, number = self._changes[weight.name]
                slopes[weight.name] += (gradient.float() * change.to(gradient.device)).sum().item() / number
                return
            near = self.masked.band(weight.name, counts[weight.name], max(int(band * weight.size), 1))
            near = near.to(gradient.device)
            moved = (gradient.float() * self.masked.value(weight.name).float()).masked_select(near)
            slopes[weight.name] -= moved.sum().item() / max(moved.numel(), 1)

        total = 0.0
        flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            with torch.enable_grad(), self.masked.active(), self.masked.gradients(receive):
                for part in _parts(rows, self.config.batch_size):
                    loss = self._divergence(part).sum() / (len(rows) * length)
                    loss.backward()
                    total += loss.item()
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        return total, slopes

    def _divergence(self, rows: range) -> Tensor:
        """(windows, length): KL of the dense from the current next-token distribution, its tail as one outcome."""
        return self._compare(self._logits(self._tokens(rows)).float(), rows)

    def _tokens(self, rows: range) -> Tensor:
        return self.validation[rows.start : rows.stop]

    def _compare(self, logits: Tensor, rows: range) -> Tensor:
        dense = torch.stack([self._dense[row][0] for row in rows]).to(logits.device).float()
        tokens = torch.stack([self._dense[row][1] for row in rows]).to(logits.device).long()
        current = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
        loss = (dense.exp() * (dense - current)).sum(-1)
        if dense.shape[-1] < logits.shape[-1]:
            rest, other = _rest(dense), _rest(current)
            loss = loss + rest.exp() * (rest - other)
        return loss

    @torch.no_grad()
    def sequential(self, counts: Mapping[str, int], rows: range) -> tuple[float, float]:
        """(loss, perplexity) on `rows` of the model as `prune` would leave it: each block after the pruned ones."""
        self.move_anchor(counts)
        self._ensure_anchor(tokens=sys.maxsize)
        self.masked.counts = counts
        with self.masked.active():
            return self._loss_and_perplexity(rows)

    def _loss_and_perplexity(self, rows: range) -> tuple[float, float]:
        loss = surprise = 0.0
        for part in _parts(rows, self.config.batch_size):
            tokens = self._tokens(part)
            logits = self._logits(tokens).float()
            loss += self._compare(logits, part).sum().item()
            following = tokens[:, 1:].to(logits.device).flatten()
            surprise += cross_entropy(logits[:, :-1].flatten(0, 1), following, reduction="sum").item()
        length = self.validation.shape[1]
        return loss / (len(rows) * length), math.exp(surprise / (len(rows) * (length - 1)))


def _change(
    tensor: Tensor, statistics: LayerStatistics | None, method: ResolvedMethod, count: int, band: float
) -> tuple[Tensor, int]:
    """What a matrix becomes with `band` of it more removed than `count`, less what it is with `band` less; how many.

    In bfloat16: it is only ever summed over.
    """
    pattern = method.pattern
    step = tensor.numel() // pattern.width if pattern.in_groups else 1  # one more of every group
    width = max(int(band * tensor.numel()), step)
    fewer, more = max(count - width, 0), min(count + width, tensor.numel())
    change = method.pruned(tensor, statistics, more) - method.pruned(tensor, statistics, fewer)
    return change.bfloat16(), more - fewer


def _first(batches: Sequence[Mapping[str, Tensor]], tokens: int) -> list[Mapping[str, Tensor]]:
    """As many batches as hold `tokens`, at least one."""
    taken: list[Mapping[str, Tensor]] = []
    for batch in batches:
        if tokens <= 0:
            break
        taken.append(batch)
        tokens -= next(iter(batch.values())).shape[:2].numel()
    return taken


def _parts(rows: range, size: int) -> list[range]:
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _rest(values: Tensor) -> Tensor:
    """log(1 − Σ exp(values)) over the last dimension, at least e⁻²⁰."""
    return torch.log1p(-values.exp().sum(-1).clamp_max(1 - 2e-9)).clamp_min(-20)
