"""How good a model is: perplexity, of every next token or of what else the model is made to predict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..common.progress import progress
from ..model.calls import feed
from ..model.examples import (
    IGNORED,
    check_causal,
    check_predicts_tokens,
    examples,
    logits_of,
    run_examples,
    specials,
)
from ..model.inputs import check_tokens


REFERENCE = "https://arxiv.org/abs/1910.14659"  # of pseudo-perplexity


def perplexity(model: nn.Module, tokens: Tensor, batch_size: int = 8, tokenizer: Any = None) -> float:
    """exp of the mean negative log-likelihood per predicted token, over non-overlapping windows.

    Of a causal language model every token but a window's first is predicted from those before it. A masked one (BERT)
    has its pseudo-perplexity: every token that is not special is masked alone and predicted from all others, as many
    forward passes as there are tokens. A sequence-to-sequence model (T5) reads the first half of every window and
    predicts the second.

    Salazar et al., 2020, https://arxiv.org/abs/1910.14659, eq. 1 and 2, of the pseudo-perplexity.

    Args:
        model (`nn.Module`): a language model.
        tokens (`Tensor`): LongTensor (samples, length), length ≥ 2; each row is a window of its own.
        batch_size (`int`, defaults to `8`): windows per forward pass.
        tokenizer (`Any`, *optional*): the model's; a masked model's mask token is taken from it.

    Raises:
        ValueError: `tokens` are not such a tensor, or lie outside the model's vocabulary; the model predicts no
            tokens, or sees those that it is to predict.
    """
    return perplexity_with_error(model, tokens, batch_size, tokenizer)[0]


def perplexity_with_error(
    model: nn.Module, tokens: Tensor, batch_size: int = 8, tokenizer: Any = None
) -> tuple[float, float | None]:
    """[`perplexity`] and its standard error, as windows of the same kind of text would scatter; `None` for one window.

    The error of the mean loss per window, carried over to its exponential. `tokens` are (samples, length).
    """
    return mean_perplexity(window_losses(model, tokens, batch_size, tokenizer))


def mean_perplexity(losses: Tensor) -> tuple[float, float | None]:
    """Perplexity and its standard error from the mean losses of windows, (samples,)."""
    # exp overflows at 710, and a broken model is to have a number, if a huge one.
    value = math.exp(min(losses.mean().item(), 700))
    # The exponential is taken as linear around the mean: its slope there is its value.
    return value, value * losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else None


def window_losses(model: nn.Module, tokens: Tensor, batch_size: int = 8, tokenizer: Any = None) -> Tensor:
    """Mean negative log-likelihood per predicted token of every window, (samples,), float64; see [`perplexity`]."""
    kind = check_predicts_tokens(model, tokenizer)
    check_tokens(tokens, model)
    if tokens.shape[1] < 2:
        raise ValueError(f"Perplexity needs windows of at least 2 tokens, got {tuple(tokens.shape)}.")
    if kind == "masked":
        return _each_masked(model, tokens, batch_size, tokenizer)
    if kind == "causal":
        check_causal(model, tokens)
    return example_losses(model, examples(model, tokens, tokenizer), batch_size, kind == "causal")


@torch.no_grad()
def example_losses(model: nn.Module, given: Mapping[str, Tensor], batch_size: int = 8, shifted: bool = True) -> Tensor:
    """Mean negative log-likelihood per label of every example, (samples,), float64.

    Args:
        given (`Mapping[str, Tensor]`): inputs by name and "labels", (samples, length) each.
        shifted (`bool`, defaults to `True`): a label is predicted at the token before it, as in causal models.
    """
    training = model.training
    model.eval()
    losses = []
    try:
        parts = {name: value.split(batch_size) for name, value in given.items()}
        batches = [dict(zip(parts, values)) for values in zip(*parts.values())]
        for batch in progress(batches, "Perplexity", "step", "optimum_dsa.evaluate"):
            logits = run_examples(model, batch)
            # one window at a time: float32 log-probabilities of a whole batch would dwarf the activations
            for row, labels in zip(logits, batch["labels"].to(logits.device)):
                row, labels = (row[:-1], labels[1:]) if shifted else (row, labels)
                total = cross_entropy(row.float(), labels, reduction="sum", ignore_index=IGNORED)
                losses.append(total.double().cpu() / (labels != IGNORED).sum().cpu())
    finally:
        model.train(training)
    return torch.stack(losses)


@torch.no_grad()
def _each_masked(model: nn.Module, tokens: Tensor, batch_size: int, tokenizer: Any) -> Tensor:
    """Mean negative log-likelihood of every window's tokens, each masked alone, (samples,), float64."""
    training = model.training
    model.eval()
    losses = []
    try:
        for window in progress(tokens.cpu(), "Pseudo-perplexity", "window", "optimum_dsa.evaluate"):
            total, places = torch.zeros((), dtype=torch.float64), (~specials(window, tokenizer)).nonzero().flatten()
            if len(places) == 0:
                raise ValueError("A window holds special tokens and no text, so there is nothing to predict in it.")
            for part in places.split(batch_size):
                copies, rows = window.repeat(len(part), 1), torch.arange(len(part))
                copies[rows, part] = tokenizer.mask_token_id
                logits = logits_of(feed(model, {"input_ids": copies}))
                found = logits[rows.to(logits.device), part.to(logits.device)].float()
                total += cross_entropy(found, window[part].to(logits.device), reduction="sum").double().cpu()
            losses.append(total / len(places))
    finally:
        model.train(training)
    return torch.stack(losses)
