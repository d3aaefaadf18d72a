"""Weights in .bin files, which transformers reads and does not write any more: their tensors, and nothing else.

A pickle can run code when it is read. torch reads these as tensors alone (`weights_only`), and ends at anything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..common.files import read_json


STEM = "pytorch_model"
# What safetensors calls a type, of those that it has.
KINDS = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}


class _Slice:
    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return KINDS[self._tensor.dtype]


class PickledTensors:
    """The tensors of a file by their names, in the words of a safetensors file that is open."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of any shape, read from the file when its numbers are."""
        return self._tensors[name]


@contextmanager
def open_pickle(path: Path) -> Iterator[PickledTensors]:
    """The tensors in the file at `path`; what is no tensor in it is passed over.

    Raises:
        ValueError: it holds more than `weights_only` reads, or is damaged.
    """
    try:
        # mapped, so that nothing but what is asked for comes into memory; files of before 2020 cannot be
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (UnpicklingError, RuntimeError, EOFError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path} holds no tensors that can be read safely: {said:.200}") from None
    content = content if isinstance(content, Mapping) else {}
    yield PickledTensors(
        {name: value for name, value in content.items() if isinstance(value, Tensor) and value.dtype in KINDS}
    )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def names_in_index(index: Any) -> list[str]:
    """The files that an index of such weights names, none of which leads out of its folder."""
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    names = {name for name in (weight_map or {}).values() if isinstance(name, str)}
    return sorted(name for name in names if re.fullmatch(r"[\w.-]+\.bin", name))


def pickled_files(folder: Path) -> list[Path]:
    """The .bin files that transformers reads the weights in `folder` from; none where there are none."""
    single, index = folder / f"{STEM}.bin", folder / f"{STEM}.bin.index.json"
    if single.is_file():
        return [single]
    names = names_in_index(read_json(index)) if index.is_file() else []
    return [folder / name for name in names if (folder / name).is_file()]
