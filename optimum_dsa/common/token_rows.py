"""Rows of token ids, from arrays, tokenised datasets and DataLoaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any


def is_token_row(value: Any) -> bool:
    """Whether a value is one row of token ids: whole numbers, one after the other."""
    value = _listed(value)
    return isinstance(value, (list, tuple)) and bool(value) and all(type(item) is int for item in value[:8])


def token_row(ids: Any, mask: Any = None) -> list[int]:
    """Token ids as a list, without those that an attention mask marks as padding."""
    ids = _listed(ids)
    return list(ids) if mask is None else [token for token, seen in zip(ids, _listed(mask)) if seen]


def as_tensors(source: Any) -> Any:
    """Token ids, (samples, length), or inputs by name as tensors, of arrays and lists; anything else as it is."""
    import torch

    def tensor(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value
        if hasattr(value, "__array__") and hasattr(value, "dtype") and value.dtype.kind in "iufb":
            return torch.as_tensor(value)
        if not isinstance(value, (list, tuple)) or not value:
            return None
        parts = [_first(part) for part in value]
        if all(isinstance(part, torch.Tensor) for part in parts):
            same = len({part.shape[1:] if part.dim() == 2 else part.shape for part in parts}) == 1
            return (torch.cat if parts[0].dim() == 2 else torch.stack)(parts) if same else None
        if all(map(is_token_row, parts)) and len({len(part) for part in parts}) == 1:
            return torch.tensor([token_row(part) for part in parts])
        return None

    if isinstance(source, Mapping):
        found = {name: tensor(value) for name, value in source.items()}
        return found if found and all(value is not None for value in found.values()) else source
    found = tensor(source)
    return source if found is None else found


def is_inputs(source: Any) -> bool:
    """Whether a source is token ids or inputs by name, as tensors: what is used whole."""
    import torch

    values = source.values() if isinstance(source, Mapping) else [source]
    return bool(values) and all(isinstance(value, torch.Tensor) for value in values)


def is_loader(source: Any) -> bool:
    """Whether a source is a DataLoader, or a dataset as torch knows them, that is read by numbers."""
    from torch.utils.data import DataLoader, Dataset

    return isinstance(source, (DataLoader, Dataset))


def loader_rows(source: Any) -> Iterator[Any]:
    """What a DataLoader's batches or a torch dataset's items hold, row by row.

    Of a tuple the first part is taken, as in (inputs, labels); of a mapping, what has a row in every part.
    """
    from torch.utils.data import DataLoader

    if isinstance(source, DataLoader):
        yield from chain.from_iterable(map(_unbatched, source))
    elif isinstance(source, Iterable) and not hasattr(source, "__len__"):
        yield from map(_first, source)
    else:
        yield from (_first(source[number]) for number in range(len(source)))


def _first(item: Any) -> Any:
    # (ids, labels), but not a row of ids or of messages
    return item[0] if isinstance(item, (tuple, list)) and item and hasattr(item[0], "shape") else item


def _unbatched(batch: Any) -> Iterable[Any]:
    batch = _first(batch)
    if isinstance(batch, Mapping):
        if others := sorted(name for name, part in batch.items() if name not in KNOWN and hasattr(part, "dim")):
            raise ValueError(
                f"The batches hold {', '.join(others)} beside token ids; give inputs like these as a mapping of "
                "tensors by name."
            )
        rows = range(len(next(iter(batch.values()), ())))
        return ({name: part[number] for name, part in batch.items()} for number in rows)
    if hasattr(batch, "dim") and batch.dim() == 1:
        return [batch]
    return batch


# Parts of a batch beside the ids that say nothing of what is read: targets, and what the model makes up itself.
KNOWN = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "special_tokens_mask")


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
