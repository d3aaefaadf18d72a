"""How much a model loses: Kullback-Leibler divergence from its dense self on validation text."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..calibration import walk_blocks
from ..configuration import DSAConfig
from ..data import Calibration
from ..evaluation import check_tokens
from ..masks import Pattern, removal_order
from ..metrics import METRICS
from ..pruning import _pruning_reads, architecture_for, pruned
from .masking import MaskedModel, quantise


# Calibration tokens that scores at an anchor are taken from: enough to rank candidates, a quarter of the time of all.
# The finalists' sequential prune reads all.
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
        self.pattern = Pattern.parse(config.recipe.pattern)
        self.sizes = {weight.name: weight.size for weight in self.architecture.weights}
        self.anchor: Mapping[str, int] | None = None
        self._device = torch.device("cpu") if hasattr(model, "hf_device_map") else model.device
        self._dense = self._dense_predictions(top)
        self._anchored = False

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
    def _ensure_anchor(self, tokens: int = ANCHOR_TOKENS) -> None:
        if self._anchored:
            return
        config, metric = self.config, METRICS[self.config.recipe.metric]
        reads = _pruning_reads(config)
        batches = None if reads == "nothing" else _first(self.calibration.batches(config.batch_size), tokens)
        self.masked.orders, self.masked.values, self.masked.counts = {}, {}, self.anchor or {}
        with self.masked.active():
            for walked in walk_blocks(
                self.model, self.architecture, batches, gram=reads == "gram", sequential=self.anchor is not None
            ):
                for weight in walked.weights:
                    tensor, statistics = walked.tensor(weight), walked.statistics.get(weight.name)
                    count = self.masked.counts.get(weight.name, 0)
                    scores = metric(tensor, statistics)
                    if count and config.recipe.update != "none":
                        new = pruned(tensor, statistics, config, count).to(tensor.dtype)
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

    def slopes(self, counts: Mapping[str, int], rows: range, width: float = 0.04) -> tuple[float, dict[str, float]]:
        """The loss, and per matrix how fast it rises as one more weight is removed.

        The loss's linearisation along the path of masks: −g · w averaged over the weights whose turn comes within
        `width` of the matrix around the count, where g is the gradient at the sparse point, for kept and removed
        weights alike. At the dense point it would vanish.
        """
        self._ensure_anchor()
        self.masked.counts = counts
        slopes = dict.fromkeys(self.sizes, 0.0)
        length = self.validation.shape[1]

        def receive(weight, gradient: Tensor) -> None:
            band = self.masked.band(weight.name, counts[weight.name], max(int(width * weight.size), 1))
            band = band.to(gradient.device)
            moved = (gradient.float() * self.masked.value(weight.name).float()).masked_select(band)
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
