"""The weight files of a checkpoint folder: found, checked before they are trusted, read and written by tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

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


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}


def width(dtype: str) -> int:
    """Bytes of an element of a type, as safetensors names it: of `BF16` two, of what does not say it (`BOOL`) one."""
    bits = re.match(r"[A-Z]+(\d+)", dtype)
    return max(int(bits[1]) // 8, 1) if bits else 1


class ShardWriter:
    """Writes a safetensors file tensor by tensor, so that no more than one has to be in memory.

    Room for the header is kept free at the start, as its content is known at the end only.

    Args:
        path (`Path`): the file.
        names (`list[str]`): the tensors that will be written.
        metadata (`dict[str, str]`): texts for the header.
    """

    def __init__(self, path: Path, names: list[str], metadata: dict[str, str] | None):
        self._header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        # per tensor: its name, and at most 40 digits of offsets, 160 of shape and 60 signs
        room = len(json.dumps(self._header)) + sum(len(json.dumps(name)) + 260 for name in names)
        # A multiple of 8, so that tensors begin where every type may be read in place.
        self._room = -(-room // 8) * 8
        self._end = 0
        self._file = path.open("wb")
        # 8 bytes for the length of the header, which come first in safetensors.
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor, dtype: str | None = None) -> None:
        """Write a tensor of any shape; `dtype` is safetensors' name of its type, where that cannot be packed."""
        # Bytes, as numpy knows no bfloat16.
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._header[name] = {
            "dtype": dtype or _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._end, self._end + data.nbytes],
        }
        self._file.write(data)
        self._end += data.nbytes

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._file as file:
            if kind is None:
                # Padded with spaces, which JSON allows behind its value.
                header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
                assert len(header) == self._room, "the room for the header was too small"
                file.seek(0)
                file.write(len(header).to_bytes(8, "little") + header)
                file.flush()
                # The folder is swapped in next: a file must not be empty there after a power failure.
                os.fsync(file.fileno())
