"""Fingerprints: whether a run that goes on sees the model and the tokens that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .offload import resident


CHUNK = 1 << 24  # weights that are brought to the CPU at once


def fingerprint_of_model(model: nn.Module) -> str:
    """Of all weights, bit by bit, and of the configuration; the same wherever accelerate keeps the weights."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    facts = config.to_dict() if hasattr(config, "to_dict") else {}
    digest.update(json.dumps(_lasting(facts), sort_keys=True, default=str).encode())
    # What is not saved (tables of positions) is computed, and no part of what the model is.
    saved = model.state_dict().keys()
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        names = [name for name, _ in own if f"{path}.{name}".lstrip(".") in saved]
        if not names:
            continue
        # of an offloaded module the weights are brought in, and looked up anew: they are other tensors then
        with resident(model, [path] if any(tensor.is_meta for _, tensor in own) else []):
            for name in names:
                _add(digest, f"{path}.{name}", getattr(module, name))
    return digest.hexdigest()


def fingerprint_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors of any shape by name, such as a model's inputs, all of them, in whichever order they are given."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _lasting(facts: Any) -> Any:
    """A configuration without where it is from and what wrote it."""
    if not isinstance(facts, Mapping):
        return facts
    passing = {"transformers_version", "_name_or_path", "name_or_path"}
    return {str(name): _lasting(value) for name, value in facts.items() if name not in passing}


def _add(digest, name: str, tensor: Tensor) -> None:
    """Take in a tensor of any shape: name, dtype and shape, then its bytes."""
    # Name and shape too: the same bytes under other names are another model.
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for part in tensor.detach().reshape(-1).split(CHUNK):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
