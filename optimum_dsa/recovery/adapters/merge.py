"""Adapters made part of a pruned model's weights, and its zeros with them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ...model.adapters import inner_model, plain_name
from ...model.architecture import find_architecture


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """What merging adapters did.

    Attributes:
        zeros (`int`): weights under the adapters that were zero before.
        filled (`int`): how many of these the adapters have another value for.
    """

    zeros: int
    filled: int


@torch.no_grad()
def merge_adapters(model: nn.Module, fill: bool = False) -> tuple[nn.Module, Merged]:
    """The model inside the PEFT model `model` with the adapters in its weights, and what that did to zeros.

    An adapter that was trained on the dense model has something to add everywhere. What it would make of a weight that
    is zero is left out, and said, unless it may `fill` them. Takes a byte of memory for each weight under an adapter.

    Raises:
        ValueError: there is no adapter, or one that PEFT cannot merge.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"{type(model).__name__} is no PEFT model with adapters to merge; put them on it with "
            "PeftModel.from_pretrained(model, adapter)."
        )
    gone = {}
    inner = inner_model(model)
    for weight in find_architecture(inner, skip_unprunable=True).weights:
        if plain_name(weight.name) != weight.name:
            gone[plain_name(weight.name)] = weight.tensor(inner) == 0
    zeros, filled = sum(int(mask.sum()) for mask in gone.values()), 0
    merged = model.merge_and_unload(safe_merge=True)
    for weight in find_architecture(merged, skip_unprunable=True).weights:
        if weight.name in gone:
            tensor = weight.tensor(merged)
            filled += int((tensor[gone[weight.name]] != 0).sum())
            if not fill:
                tensor.masked_fill_(gone[weight.name], 0)
    if filled:
        logger.warning(
            "The adapters have a value for %d of the %d zeros under them (%.2f%%), as those that were trained on a "
            "dense model do: %s.",
            filled,
            zeros,
            100 * filled / zeros,
            "these are zero no more" if fill else "these stay zero, and what the adapters had there is left out",
        )
    return merged, Merged(zeros, filled)
