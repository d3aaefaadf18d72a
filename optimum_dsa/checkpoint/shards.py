"""The weight files of a checkpoint folder: found, checked before they are trusted, and read by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..common.files import read_json
from ..model.parameters import count_parameters
from .encodings import BITMASK, ENCODINGS, Encoding, Header, header_bytes, header_in


_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Shards:
    """The weights of a folder.

    Attributes:
        folder (`Path`): where they are.
        encoding (`Encoding`): how tensors are stored in them.
        files (`tuple[str, ...]`): names of the files, in order.
        index (`dict[str, Any]`): the content of the index that names them; `None` for a single file without one.
    """

    folder: Path
    encoding: Encoding
    files: tuple[str, ...]
    index: dict[str, Any] | None = None


def find_shards(folder: str | Path) -> Shards:
    """The weights in `folder`.

    Raises:
        FileNotFoundError: there are none in safetensors.
        ValueError: the index is damaged, or names something else than a file of this folder.
    """
    folder = Path(folder)
    there = [encoding for encoding in ENCODINGS.values() if _has_weights(folder, encoding.stem)]
    if len(there) > 1:
        both = " and ".join(encoding.shown for encoding in there)
        raise ValueError(f"{folder} holds {both} weights, which may differ; remove the one or the other.")
    for encoding in there:
        path = folder / index_name(encoding.stem)
        if path.is_file():
            index = read_json(path)
            return Shards(folder, encoding, check_index(index, path), index)
        return Shards(folder, encoding, (f"{encoding.stem}.safetensors",))
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise FileNotFoundError(
            f"{folder} holds weights in {pickles[0]} only. That is a pickle, which can run code when it is read, so "
            "optimum-dsa does not; save the model with transformers as safetensors first."
        )
    raise FileNotFoundError(f"{folder} holds no weights: neither model.safetensors nor {index_name(BITMASK.stem)}.")


def _has_weights(folder: Path, stem: str) -> bool:
    return (folder / index_name(stem)).is_file() or (folder / f"{stem}.safetensors").is_file()


def index_name(stem: str) -> str:
    """The name of the index of sharded weights."""
    return f"{stem}.safetensors.index.json"


def check_index(index: Any, path: Path) -> tuple[str, ...]:
    """The files that the index at `path` names, in order; they are there.

    Raises:
        ValueError: it is no index, or names anything but a safetensors file beside it.
        FileNotFoundError: one of the files is not there.
    """
    files = index_files(index, path)
    for file in files:
        if not (path.parent / file).is_file():
            raise FileNotFoundError(f"{path} names {file}, which is not there; the checkpoint is incomplete.")
    return files


def index_files(index: Any, path: Path) -> tuple[str, ...]:
    """The files that the index at `path` names, in order, there or not.

    Raises:
        ValueError: it is no index, or names anything but a safetensors file beside it.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} is no index of weights: it has no 'weight_map'.")
    for name, file in weight_map.items():
        # An index is a text from a stranger: "../../other" would be read, packed and pushed.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path} puts {name} into {file!r}; weights are read from safetensors files beside their index only."
            )
    return tuple(sorted(set(weight_map.values())))


@contextmanager
def open_shard(path: str | Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, opened; `ValueError` where it is something else, such as a pickle under this name."""
    try:
        file = safe_open(path, framework=framework)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); download or convert it again.") from None
    with file as opened:
        yield opened


def packed_headers(path: str | Path) -> dict[str, Header]:
    """Name -> header of every encoded tensor in a file; nothing but headers is read.

    Raises:
        ValueError: a header that its tensor cannot have, or no safetensors file.
    """
    headers = {}
    with open_shard(path, "np") as file:  # not "pt": transformers makes models in the context of a device without data
        names = list(file.keys())
        for name in names:
            part = file.get_slice(name)
            # A slice reads its bytes only: headers of a large checkpoint cost no memory.
            if part.get_dtype() == "U8" and len(part.get_shape()) == 1 and part.get_shape()[0] > 0:
                length = part.get_shape()[0]
                start = part[: min(header_bytes(), length)].tobytes()
                found = header_in(start, length, f"{name} in {path}")
                if found is not None:
                    headers[name] = found[1]
    return headers


def count_weights(path: str | Path) -> int:
    """Weights in a file, zeros included; nothing but headers is read."""
    packed = packed_headers(path)
    with open_shard(path, "np") as file:
        plain = [file.get_slice(name).get_shape() for name in file.keys() if name not in packed]  # noqa: SIM118
    return sum(header.size for header in packed.values()) + sum(math.prod(shape) for shape in plain)


def check_size(model: nn.Module, weights: int, where: str | Path) -> None:
    """Raise `ValueError` where a model, without data yet, has many more parameters than its checkpoint has weights.

    What a checkpoint lacks is filled with random numbers, so that a `config.json` could ask for any amount of memory.
    """
    wanted = count_parameters(model)
    if wanted > 3 * weights + 2**20:  # shared weights are stored once
        raise ValueError(
            f"The config.json of {where} asks for {wanted:,} parameters, and the checkpoint has {weights:,} weights; "
            "they do not belong together."
        )
