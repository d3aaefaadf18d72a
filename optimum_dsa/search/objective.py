"""How much a model loses: Kullback-Leibler divergence from its dense self on validation text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..common.fences import has_device_map
from ..model.adapters import inner_model
from ..model.examples import check_causal
from ..model.inputs import KINDS, check_tokens, kind_of
from .realise import Realisation


def check_predicts(model: nn.Module) -> None:
    """Raise `ValueError` where a model predicts no next tokens, by which candidates could be compared."""
    if (kind := kind_of(model)) != "causal":
        raise ValueError(
            f"{type(inner_model(model)).__name__} {KINDS[kind]}, and a search compares allocations by the next tokens "
            "that they predict; prune it with a named allocation, such as 'owl'."
        )


class Objective:
    """Losses of candidates, as counts of weights to remove per unit.

    What does not depend on the candidate is made once: the dense model's `top` most probable next tokens and their
    log-probabilities at every position. The model itself is never changed.

    Args:
        model: a causal language model.
        realisation: makes it as if a candidate's weights were gone.
        validation: LongTensor (windows, length): guides the choice, and nothing else.
        batch_size: windows per forward pass.
        top: next tokens per position that the divergence tells apart; the rest counts as one.
    """

    def __init__(
        self, model: nn.Module, realisation: Realisation, validation: Tensor, batch_size: int = 8, top: int = 512
    ):
        """Keep what the dense model predicts for `validation`, (windows, length) int64."""
        check_predicts(model)
        check_tokens(validation, model)
        check_causal(model, validation)
        self.model, self.realisation, self._metric = model, realisation, None
        self.validation, self.batch_size = validation, batch_size
        self._device = torch.device("cpu") if has_device_map(model) else model.device
        self._dense = self._dense_predictions(top)

    @torch.no_grad()
    def _dense_predictions(self, top: int) -> list[tuple[Tensor, Tensor]]:
        """Per window, log-probabilities (length, top) and token ids of the dense model's likeliest next tokens."""
        found = []
        for rows in self.validation.split(self.batch_size):
            logits = self._logits(rows).float()
            highest = logits.topk(min(top, logits.shape[-1]), dim=-1)
            values = highest.values - logits.logsumexp(-1, keepdim=True)
            # int16 ends at 32,767; at 512 tokens a position the dtype decides what stays in memory.
            small = torch.int32 if logits.shape[-1] > 2**15 else torch.int16
            found += list(zip(values.half().cpu(), highest.indices.to(small).cpu()))
        return found

    def _logits(self, rows: Tensor) -> Tensor:
        """Logits of token ids (windows, length): (windows, length, vocabulary)."""
        return self.model(input_ids=rows.to(self._device), use_cache=False).logits

    def move_anchor(self, counts: Mapping[str, int] | None) -> None:
        """Judge from now on by what the model without `counts` tells; `None`: by that where a realisation begins."""
        self.realisation.move_anchor(counts)

    def take_metric(self, metric: str | None) -> None:
        """Judge from now on what this metric removes; `None`: the config's. Only `MetricMasks` knows another one."""
        if metric != self._metric:
            self.realisation.take_metric(metric)
            self._metric = metric

    @torch.no_grad()
    def loss(self, counts: Mapping[str, int], rows: range) -> float:
        """Mean divergence per token with `counts` removed, on the validation windows `rows`: a proxy, see `pruned`."""
        total = 0.0
        with self.realisation.at(counts):
            for part in _parts(rows, self.batch_size):
                total += self._divergence(part).sum().item()
        return total / (len(rows) * self.validation.shape[1])

    def slopes(self, counts: Mapping[str, int], rows: range) -> tuple[float, dict[str, float]]:
        """The loss, and per unit how fast it rises as one more weight is removed."""
        total = 0.0
        with self.realisation.slopes(counts) as slopes:
            for part in _parts(rows, self.batch_size):
                loss = self._divergence(part).sum() / (len(rows) * self.validation.shape[1])
                # Part by part: gradients add up, and the activations of one part are alive at a time.
                loss.backward()
                total += loss.item()
        return total, slopes

    def errors(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Unit -> the share of its output that is lost with `counts` removed; no validation text is read."""
        return self.realisation.errors(counts)

    def _divergence(self, rows: range) -> Tensor:
        """(windows, length): KL of the dense from the current next-token distribution, its tail as one outcome."""
        return self._compare(self._logits(self._tokens(rows)).float(), rows)

    def _tokens(self, rows: range) -> Tensor:
        """Token ids of these windows, (windows, length) int64."""
        return self.validation[rows.start : rows.stop]

    def _compare(self, logits: Tensor, rows: range) -> Tensor:
        """(windows, length): divergence of `logits`, (windows, length, vocabulary), from those of the dense model."""
        dense = torch.stack([self._dense[row][0] for row in rows]).to(logits.device).float()
        tokens = torch.stack([self._dense[row][1] for row in rows]).to(logits.device).long()
        current = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
        loss = (dense.exp() * (dense - current)).sum(-1)
        # Else the top holds the whole vocabulary, and nothing is left over.
        if dense.shape[-1] < logits.shape[-1]:
            rest, other = _rest(dense), _rest(current)
            loss = loss + rest.exp() * (rest - other)
        return loss

    @torch.no_grad()
    def sequential(self, counts: Mapping[str, int], rows: range) -> tuple[float, float]:
        """(loss, perplexity) on `rows` of the model as `prune` would leave it: each block after the pruned ones."""
        with self.realisation.pruned(counts):
            return self._loss_and_perplexity(rows)

    def _loss_and_perplexity(self, rows: range) -> tuple[float, float]:
        loss = surprise = 0.0
        for part in _parts(rows, self.batch_size):
            tokens = self._tokens(part)
            logits = self._logits(tokens).float()
            loss += self._compare(logits, part).sum().item()
            following = tokens[:, 1:].to(logits.device).flatten()
            surprise += cross_entropy(logits[:, :-1].flatten(0, 1), following, reduction="sum").item()
        # The last token of a window has no next one to be surprised by.
        length = self.validation.shape[1]
        return loss / (len(rows) * length), math.exp(surprise / (len(rows) * (length - 1)))


def _parts(rows: range, size: int) -> list[range]:
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _rest(values: Tensor) -> Tensor:
    """log(1 − Σ exp(values)) over the last dimension, (..., top) -> (...); of a tail below eps, that."""
    # Rounded halves may add up to more than 1; and at 1 itself the logarithm has no slope, but NaN.
    return torch.log1p(-values.exp().sum(-1).clamp_max(1 - torch.finfo(values.dtype).eps))
