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

# numpy knows no bfloat16, and as an integer -0.0 is not zero.
_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}
# How many ones a byte has: a table, looked up by the mask itself.
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
    weights = flat.view(torch.uint8).numpy().view(_INTEGERS[tensor.dtype.itemsize])
    header = Header(tensor.dtype, tuple(tensor.shape), int(np.count_nonzero(weights)))
    if header.bytes >= tensor.nbytes:
        return None
    # Zeros, so that padding is the same in every file: equal tensors have equal bytes.
    packed = np.zeros(header.bytes, np.uint8)
    facts = [MAGIC, TYPES.index(header.dtype), header.kept, len(header.shape), *header.shape]
    packed[: header.mask.start].view("<i8")[:] = facts
    mask, values = packed[header.mask], packed[header.values].view(weights.dtype)
    done = 0
    for start in range(0, header.size, CHUNK):
        part = weights[start : start + CHUNK]
        some = part != 0
        bits = np.packbits(some, bitorder="little")
        mask[start // 8 : start // 8 + len(bits)] = bits
        # positions of a boolean mask, and values by position: four times as fast as either step in another way
        kept = np.flatnonzero(some)
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
    # In Python, whose numbers do not overflow: a shape of 2⁶³ · 2 is not 0.
    if min(shape) < 0 or not 0 <= kept <= header.size or header.bytes != length:
        raise ValueError(
            f"{name} is damaged: its header says shape {shape} with {kept} weights kept, which does not fit into its "
            f"{length} bytes; download or convert the checkpoint again."
        )
    return header


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor, of any shape, has the mark of a packed one, (bytes,) uint8."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) < 40:
        return False
    return int.from_bytes(tensor[:8].cpu().numpy().tobytes(), "little") == MAGIC


def unpack(packed: Tensor, name: str = "tensor") -> Tensor:
    """The tensor that was packed as `packed`, (bytes,) uint8, on its device; the work is done on the CPU.

    Raises:
        ValueError: `packed` is no packed tensor, or damaged.
    """
    device, packed = packed.device, packed.cpu()
    header = read_header(packed[:LARGEST].numpy().tobytes(), packed.numel(), name)
    if header is None:
        raise ValueError(f"{name} is no packed tensor.")
    bits = packed[header.mask].numpy()
    # Before memory is taken for the weights: a wrong mask would read values beyond their end.
    ones = int(_ONES[bits].sum(dtype=np.int64))
    if ones != header.kept or (header.size % 8 and bits[-1] >> header.size % 8):
        raise ValueError(f"{name} is damaged: its mask keeps {ones} weights, its header {header.kept}.")
    integer = _INTEGERS[header.dtype.itemsize]
    values = packed[header.values].numpy().view(integer)
    weights = np.zeros(header.size, integer)
    done = 0
    for start in range(0, header.size, CHUNK):
        part = weights[start : start + CHUNK]
        some = np.unpackbits(bits[start // 8 : (start + CHUNK) // 8], count=len(part), bitorder="little")
        positions = np.flatnonzero(some.view(bool))
        part[positions] = values[done : done + len(positions)]
        done += len(positions)
    return torch.from_numpy(weights).view(header.dtype).view(header.shape).to(device)


def _padded(length: int) -> int:
    return -(-length // 8) * 8
