"""What a processor returned, in a list, a DataLoader or a dataset: batches of a model's inputs by name."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..common.escaping import one_line
from ..common.token_rows import is_loader


logger = logging.getLogger(__name__)

FEW = 64  # of a list so many items tell what it holds
# Inputs that no text gives, and of how many dimensions one sample of them is.
MEDIA = {"pixel_values": 3, "pixel_values_videos": 4, "input_features": 2, "input_values": 1}


def model_batches(
    source: Any, main: str, takes: Collection[str], wanted: int, seed: int = 0
) -> list[dict[str, Tensor]] | None:
    """Inputs by name, (samples, ...) each, of what holds pictures or sound as a processor returns them.

    `None` where `source` is something else, such as text or rows of token ids. A list is taken whole; of a
    DataLoader or a stream the first batches that hold `wanted` samples, of a dataset as many rows, drawn by `seed`.

    Args:
        main: the model's main input, which a tensor without a name is, as in (pictures, labels).
        takes: the names of all its inputs; of a table no others are looked at, as it may have text beside.
    """
    if not any(MEDIA.keys() & _named(item, main).keys() for item in _looked_at(source, takes)):
        return None
    passed: set[str] = set()
    if isinstance(source, (list, tuple)):
        return _say(passed, [_tensors(item, main, passed) for item in source])
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
        return _say(passed, [_tensors(source[number], main, passed) for number in order])
    found: list[dict[str, Tensor]] = []
    samples = 0
    for item in source:
        found.append(_tensors(item, main, passed))
        samples += len(next(iter(found[-1].values())))
        if samples >= wanted:
            break
    return _say(passed, found)


def _looked_at(source: Any, takes: Collection[str]) -> Iterable[Any]:
    """Parts of a source that tell what it holds, of one that can be asked for them more than once."""
    if isinstance(source, (list, tuple)):
        return source[:FEW]
    if isinstance(names := getattr(source, "column_names", None), list):
        return [dict.fromkeys({*names} & {*takes})]
    if not is_loader(source):
        return ()
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return [source[0]] if len(source) else ()
    # What comes only once would be lost for whoever reads it as text.
    stream = getattr(source, "dataset", source)
    once = isinstance(stream, IterableDataset) and iter(stream) is iter(stream)
    return () if once else islice(iter(source), 1)


def _named(item: Any, main: str) -> Mapping[str, Any]:
    """Inputs by name of a batch or row: of (inputs, labels) the first part; a tensor alone is the main input."""
    if isinstance(item, (tuple, list)) and item and (isinstance(item[0], Mapping) or hasattr(item[0], "shape")):
        item = item[0]
    if isinstance(item, Mapping):
        return item
    return {main: item} if hasattr(item, "shape") else {}


def _tensors(item: Any, main: str, passed: set[str]) -> dict[str, Tensor]:
    """A batch of tensors, (samples, ...) by name, of a batch or of one row; what cannot be one is `passed` over."""
    named = _named(item, main)
    found = {name: tensor for name, value in named.items() if (tensor := _tensor(value)) is not None}
    passed |= {str(name) for name in named if name not in found}
    if not found:
        raise ValueError(
            f"Batches hold inputs by name, and one of them is a {type(item).__name__}: {str(item)[:60]!r}."
        )
    if "input_ids" in found:
        is_row = found["input_ids"].dim() == 1
    else:
        is_row = any(found[name].dim() == size for name, size in MEDIA.items() if name in found)
    if not is_row:
        return found
    # Beside tokens pictures may come in rows of their own already: patches of all of them, one after the other.
    alone = "input_ids" not in found
    return {name: value[None] if alone or _is_of_one(name, value) else value for name, value in found.items()}


def _is_of_one(name: str, value: Tensor) -> bool:
    """Whether an input beside tokens is of one sample, and has no dimension for several of them."""
    return value.dim() == MEDIA[name] if name in MEDIA else value.dim() <= 1


def _tensor(value: Any) -> Tensor | None:
    """A tensor of any shape, of an array, a number, or lists of these; `None` of anything else, such as words."""
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, (list, tuple)) and value and hasattr(value[0], "shape"):
            return torch.stack([torch.as_tensor(part) for part in value])
        return None if value is None else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _say(passed: set[str], found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    if passed:
        logger.warning("Of the batches, what is no tensor is not used: %s.", one_line(", ".join(sorted(passed))))
    return found
