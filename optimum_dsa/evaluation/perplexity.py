"""How good a model is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..common.fences import has_device_map
from ..common.progress import progress
from ..model.inputs import check_tokens


def perplexity(model: nn.Module, tokens: Tensor, batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood per predicted token, over non-overlapping windows.

    Args:
        model (`nn.Module`): a causal language model.
        tokens (`Tensor`): LongTensor (samples, length), length ≥ 2; each row is a window of its own, its first token
            given.
        batch_size (`int`, defaults to `8`): windows per forward pass.

    Raises:
        ValueError: `tokens` are not such a tensor, or lie outside the model's vocabulary.
    """
    return perplexity_with_error(model, tokens, batch_size)[0]


def perplexity_with_error(model: nn.Module, tokens: Tensor, batch_size: int = 8) -> tuple[float, float | None]:
    """[`perplexity`] and its standard error, as windows of the same kind of text would scatter; `None` for one window.

    The error of the mean loss per window, carried over to its exponential. `tokens` are (samples, length).
    """
    return mean_perplexity(window_losses(model, tokens, batch_size))


def mean_perplexity(losses: Tensor) -> tuple[float, float | None]:
    """Perplexity and its standard error from the mean losses of windows, (samples,)."""
    # exp overflows at 710, and a broken model is to have a number, if a huge one.
    value = math.exp(min(losses.mean().item(), 700))
    # The exponential is taken as linear around the mean: its slope there is its value.
    return value, value * losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else None


@torch.no_grad()
def window_losses(model: nn.Module, tokens: Tensor, batch_size: int = 8) -> Tensor:
    """Mean negative log-likelihood per predicted token of every window, (samples,), float64; see [`perplexity`]."""
    check_tokens(tokens, model)
    if tokens.shape[1] < 2:
        raise ValueError(f"Perplexity needs windows of at least 2 tokens, got {tuple(tokens.shape)}.")
    training = model.training
    model.eval()
    device = torch.device("cpu") if has_device_map(model) else model.device
    losses = []
    try:
        for batch in progress(tokens.split(batch_size), "Perplexity", "step", "optimum_dsa.evaluate"):
            batch = batch.to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            # one window at a time: float32 log-probabilities of a whole batch would dwarf the activations
            for row, targets in zip(logits, batch):
                total = nn.functional.cross_entropy(row[:-1].float(), targets[1:].to(row.device), reduction="sum")
                losses.append(total.double().cpu() / (len(targets) - 1))
    finally:
        model.train(training)
    return torch.stack(losses)
