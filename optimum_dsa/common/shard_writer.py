"""A safetensors file written tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


NAMES = {  # of types, in safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(values: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors on the CPU, of any shapes, as the safetensors file `path`; none of them is copied."""
    # the widest types first, so that every tensor begins at a multiple of its width
    names = sorted(values, key=lambda name: (-values[name].itemsize, name))
    with ShardWriter(path, names, metadata) as writer:
        for name in names:
            writer.add(name, values[name])


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
        # 8 bytes for the length of the header, which come first in safetensors.
        self._start, self._end = 8 + self._room, 0
        self._reserved: dict[str, list[int]] = {}
        self._file = path.open("wb")
        self._file.seek(self._start)

    def add(self, name: str, tensor: Tensor, dtype: str | None = None) -> None:
        """Write a tensor of any shape; `dtype` is safetensors' name of its type, where that cannot be packed."""
        self._place(name, tensor.shape, dtype or NAMES[tensor.dtype], tensor.nbytes)
        self._write(tensor)

    def reserve(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Keep room for a tensor that comes with `fill`, where what lies behind it is known first."""
        self._place(name, shape, NAMES[dtype], math.prod(shape) * dtype.itemsize)
        self._reserved[name] = self._header[name]["data_offsets"]
        self._file.seek(self._start + self._end)

    def fill(self, name: str, tensor: Tensor) -> None:
        """Write the tensor whose room was reserved."""
        begin, end = self._reserved.pop(name)
        assert tensor.nbytes == end - begin, f"{name} does not fit its room"
        self._file.seek(self._start + begin)
        self._write(tensor)
        self._file.seek(self._start + self._end)

    def _place(self, name: str, shape: Sequence[int], dtype: str, size: int) -> None:
        offsets = [self._end, self._end + size]
        self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self._end += size

    def _write(self, tensor: Tensor) -> None:
        # Bytes, as numpy knows no bfloat16.
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._file as file:
            if kind is None:
                assert not self._reserved, f"never filled: {', '.join(self._reserved)}"
                # Padded with spaces, which JSON allows behind its value.
                header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
                assert len(header) == self._room, "the room for the header was too small"
                file.seek(0)
                file.write(len(header).to_bytes(8, "little") + header)
                file.flush()
                # The folder is swapped in next: a file must not be empty there after a power failure.
                os.fsync(file.fileno())
