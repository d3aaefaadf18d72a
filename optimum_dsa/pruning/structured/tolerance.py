"""The inverse question: how much may go, if the perplexity may rise by so much?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...model.calls import feed
from ...model.inputs import KINDS, kind_of
from ..calibration import Calibration
from ..source import Source
from .configuration import DSAStructuredConfig, rise_of
from .instead import evaluating
from .prune import choose_counts
from .trial import as_pruned, check_tried, dense_to_try
from .widths.dense import Dense


HELD_OUT = 4  # one of so many calibration windows judges, and calibrates nothing


@dataclass(frozen=True)
class Tolerated:
    """How much may go.

    Attributes:
        sparsity (`float`): the largest share that was tried whose loss is tolerated, for a `DSAStructuredConfig`; 0
            where none is.
        max_loss (`float`): by what share the perplexity might rise.
        dense (`float`): perplexity of the dense model on the held-out windows.
        tried (`Mapping[float, float]`): share -> perplexity there, in the order in which they were tried.
    """

    sparsity: float
    max_loss: float
    dense: float
    tried: Mapping[float, float]

    def __str__(self) -> str:
        rise = self.tried.get(self.sparsity, self.dense) / self.dense - 1
        return (
            f"{self.sparsity:.4f} may go: perplexity rises by {rise:.1%} of at most {self.max_loss:.1%} "
            f"(dense {self.dense:.2f}, held-out windows, {len(self.tried)} shares tried)"
        )


def settled(
    model: nn.Module, calibration: Source | None, config: DSAStructuredConfig
) -> tuple[DSAStructuredConfig, dict[str, float]]:
    """A configuration with the share that its `max_loss` allows, and what was found: perplexities by name.

    Raises:
        ValueError: not even the least share that was tried is tolerated; and what [`find_share`] refuses.
    """
    found = find_share(model, calibration, config, config.max_loss)
    if not found.sparsity:
        least = min(found.tried, default=None)
        tried = "" if least is None else f": {least:.4f} gave a rise by {found.tried[least] / found.dense - 1:.1%}"
        raise ValueError(
            f"No share was found for max_loss={config.max_loss!r}{tried}; tolerate more, or say a sparsity."
        )
    facts = {"max_loss": found.max_loss, "dense": found.dense, "found": found.tried[found.sparsity]}
    return replace(config, sparsity=found.sparsity, max_loss=None), {**facts, "trials": len(found.tried)}


def find_share(
    model: nn.Module, calibration: Source | None, config: DSAStructuredConfig, max_loss: float | str, trials: int = 7
) -> Tolerated:
    """The largest share that `config` may take so that the perplexity rises by `max_loss` at most.

    By bisection: at each share the model is pruned as `config` says, judged on a quarter of the calibration windows,
    which calibrate nothing, and put back. A reconstruction is not made, so that with one the perplexity is lower.
    Costs the walk of a prune for each trial.

    Args:
        calibration (`Any`): as of `prune_structures`; two windows at least.
        config (`DSAStructuredConfig`): its `sparsity` is the most that is tried; 0 stands for all that can go.
        max_loss (`float` or `str`): share by which the perplexity may rise, such as 0.05 or `"5%"`.
        trials (`int`, defaults to 7): how often the range is halved.

    Raises:
        ValueError: the tolerance is none, the model predicts no next tokens, or there are too few windows.
    """
    config, tolerance = replace(config, max_loss=None), rise_of(max_loss)
    check_tried(config, "max_loss", model)
    if (kind := kind_of(model)) != "causal":
        raise ValueError(f"{type(model).__name__} {KINDS[kind]}, and a perplexity is of next tokens; name a sparsity.")
    dense, held_out = _apart(dense_to_try(model, calibration, replace(config, sparsity=0.0)))
    before = _perplexity(model, held_out)
    low, high = 0.0, config.sparsity or _most(dense)
    tried: dict[float, float] = {}
    for number in range(trials):
        # What is given may be tolerated as it is.
        share = high if number == 0 and config.sparsity else (low + high) / 2
        try:
            counts, _ = choose_counts(there := dense.at(share))
        except ValueError:
            # The class, or the least structure, allows no such share.
            high = share
            continue
        with as_pruned(there, counts):
            tried[share] = _perplexity(model, held_out)
        if tried[share] <= before * (1 + tolerance):
            low = share
        else:
            high = share
        if low == high:
            break
    return Tolerated(low, tolerance, before, tried)


def _apart(dense: Dense) -> tuple[Dense, list[dict[str, Tensor]]]:
    """The model with fewer calibration windows, and batches of the others, by which shares are judged."""
    known = dense.calibration
    samples = 0 if known.parts else len(next(iter(known.inputs.values())))
    if samples < 2:
        raise ValueError(
            "max_loss calibrates on some windows and judges by others; give two windows of text or tokens at least."
        )
    kept = samples - max(samples // HELD_OUT, 1)
    first, last = (
        replace(known, inputs={name: value[part] for name, value in known.inputs.items()})
        for part in (slice(None, kept), slice(kept, None))
    )
    return replace(dense, calibration=first, known={}), Calibration.batches(last, dense.config.batch_size)


def _most(dense: Dense) -> float:
    """The share that goes with all that can."""
    cost = dense.costs[dense.config.cost]
    return sum(size.most * size.cost for size in dense.sizes.values()) / cost.total


@torch.no_grad()
def _perplexity(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """exp of the mean surprise by the next token in batches of the model's inputs, (samples, length, ...) each."""
    total, number = 0.0, 0
    for batch in batches:
        with evaluating(model):
            logits = feed(model, batch).logits[:, :-1].float()
        following = batch["input_ids"][:, 1:].to(logits.device)
        if (mask := batch.get("attention_mask")) is not None:
            following = following.masked_fill(mask[:, 1:].to(logits.device) == 0, -100)
        total += cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum").item()
        number += int((following != -100).sum())
    return math.exp(min(total / max(number, 1), 700.0))
