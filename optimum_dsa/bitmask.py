"""One tensor with zeros as one tensor of bytes: which weights are kept, then their values.

A packed tensor is a vector of uint8, little-endian, every part padded with zeros to 8 bytes:

| part   | bytes                  | content                                                                          |
|--------|------------------------|----------------------------------------------------------------------------------|
| header | 8 · (4 + dimensions)   | int64: the letters `DSAMASK1`, the type's place in `TYPES`, the number of kept   |
|        |                        | weights, the number of dimensions, the shape                                     |
| mask   | weights ÷ 8            | one bit per weight, lowest bit first: 1 where its bits are not all zero          |
| values | kept · bytes of a type | the kept weights in their order, bit for bit                                     |

A weight counts as zero where all its bits are: -0.0 and NaN are values, so that what is unpacked is what was packed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


MAGIC = int.from_bytes(b"DSAMASK1", "little")
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # never reorder: files hold the places
DIMENSIONS = 8  # at most
LARGEST = 8 * (4 + DIMENSIONS)  # bytes of a header
CHUNK = 2**16  # weights that are worked on at once, a multiple of 8: stays in a processor's cache

_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


@dataclass(frozen=True)
class Header:
    """What a packed tensor says of itself: type, shape and number of kept weights."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: int

    @property
    def size(self) -> int:
        """Weights, zeros included."""
        return math.prod(self.shape)

    @property
    def mask(self) -> slice:
        """The bytes of the mask."""
        start = 8 * (4 + len(self.shape))
        return slice(start, start + -(-self.size // 8))

    @property
    def values(self) -> slice:
        """The bytes of the values."""
        start = _padded(self.mask.stop)
        return slice(start, start + self.kept * self.dtype.itemsize)

    @property
    def bytes(self) -> int:
        """Bytes of the packed tensor."""
        return _padded(self.values.stop)


def can_pack(dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this type and shape may be packed: floating point of two bytes or more, not a scalar."""
    return dtype in TYPES and 0 < len(shape) <= DIMENSIONS


def pack(tensor: Tensor) -> Tensor | None:
    """The packed form of a tensor on the CPU, (bytes,) uint8; `None` where it would not be smaller."""
    if not can_pack(tensor.dtype, tuple(tensor.shape)):
        return None
    flat = tensor.detach().contiguous().flatten()
    weights = flat.view(getattr(torch, f"int{8 * tensor.dtype.itemsize}")).numpy()
    header = Header(tensor.dtype, tuple(tensor.shape), int(np.count_nonzero(weights)))
    if header.bytes >= tensor.nbytes:
        return None
    packed = np.zeros(header.bytes, np.uint8)
    facts = [MAGIC, TYPES.index(header.dtype), header.kept, len(header.shape), *header.shape]
    packed[: header.mask.start].view("<i8")[:] = facts
    mask, values = packed[header.mask], packed[header.values].view(weights.dtype)
    done = 0
    for start in range(0, header.size, CHUNK):
        part = weights[start : start + CHUNK]
        bits = np.packbits(part != 0, bitorder="little")
        mask[start // 8 : start // 8 + len(bits)] = bits
        # taking by position is four times as fast as taking by a boolean mask
        kept = np.flatnonzero(part)
        part.take(kept, out=values[done : done + len(kept)])
        done += len(kept)
    return torch.from_numpy(packed)


def read_header(start: bytes, length: int, name: str = "tensor") -> Header | None:
    """The header of a packed tensor of `length` bytes from its first `LARGEST` bytes; `None` if it is none.

    Raises:
        ValueError: it has the mark of a packed tensor, but its parts cannot be what they say. So a header is refused
            before memory is taken for what it promises: weights are never more than 8 per byte of the tensor.
    """
    facts = np.frombuffer(start[: min(len(start), LARGEST) // 8 * 8], "<i8").tolist()
    if len(facts) < 5 or facts[0] != MAGIC:
        return None
    code, kept, dimensions, shape = facts[1], facts[2], facts[3], tuple(facts[4 : 4 + facts[3]])
    if not (0 <= code < len(TYPES) and 0 < dimensions <= DIMENSIONS and len(shape) == dimensions):
        raise ValueError(f"{name} is damaged: a packed tensor of type {code} in {dimensions} dimensions.")
    header = Header(TYPES[code], shape, kept)
    if min(shape) < 0 or not 0 <= kept <= header.size or header.bytes != length:
        raise ValueError(
            f"{name} is damaged: its header says shape {shape} with {kept} weights kept, which does not fit into its "
            f"{length} bytes; download or convert the checkpoint again."
        )
    return header


def unpack(packed: Tensor, name: str = "tensor") -> Tensor:
    """The tensor that was packed, on the device of `packed`.

    Raises:
        ValueError: `packed` is no packed tensor, or damaged.
    """
    header = read_header(packed[:LARGEST].cpu().numpy().tobytes(), packed.numel(), name)
    if header is None:
        raise ValueError(f"{name} is no packed tensor.")
    mask = packed[header.mask]
    ones = int(_ONES[mask.cpu().numpy()].sum(dtype=np.int64))
    last = int(mask[-1]) >> (header.size % 8) if header.size % 8 else 0
    if ones != header.kept or last:
        raise ValueError(f"{name} is damaged: its mask keeps {ones} weights, its header {header.kept}.")
    unpacker = _unpack_on_cpu if packed.device.type == "cpu" else _unpack_on_device
    return unpacker(mask, packed[header.values], header).view(header.shape)


def _unpack_on_cpu(mask: Tensor, values: Tensor, header: Header) -> Tensor:
    integer = _INTEGERS[header.dtype.itemsize]
    bits, kept = mask.numpy(), values.numpy().view(integer)
    weights = np.zeros(header.size, integer)
    done = 0
    for start in range(0, header.size, CHUNK):
        part = weights[start : start + CHUNK]
        positions = np.flatnonzero(
            np.unpackbits(bits[start // 8 : (start + CHUNK) // 8], count=len(part), bitorder="little").view(bool)
        )
        part[positions] = kept[done : done + len(positions)]
        done += len(positions)
    return torch.from_numpy(weights).view(header.dtype)


def _unpack_on_device(mask: Tensor, values: Tensor, header: Header) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    kept = ((mask[:, None] >> shifts) & 1).flatten()[: header.size].bool()
    weights = torch.zeros(header.size, dtype=header.dtype, device=mask.device)
    return weights.masked_scatter_(kept, values.clone().view(header.dtype))


def _padded(length: int) -> int:
    return -(-length // 8) * 8
