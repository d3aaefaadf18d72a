"""A matrix of whole numbers and scales as one tensor of bytes: what its header says, and where its parts lie.

A vector of uint8, little-endian, every part padded with zeros to 8 bytes:

| part   | bytes                | content                                                                            |
|--------|----------------------|------------------------------------------------------------------------------------|
| header | 8 · (9 + dimensions) | int64: the letters `DSAWHOL1`, the place in `TYPES` of what it becomes, the number |
|        |                      | of kept weights, the number of dimensions, bits of a number, columns that share a  |
|        |                      | scale (0: a row), bytes of all numbers, the place in `TYPES` of the scales, 1      |
|        |                      | where the last two dimensions are exchanged; the shape                             |
| mask   | weights ÷ 8          | one bit per weight, lowest bit first: 1 where it is kept                           |
| values | see header           | int8; or two numbers of 4 bits a byte, the first one low, every row at a byte      |
| scales | groups · of a type   | row by row, of every group of columns                                              |

Rows are all dimensions but the last: a stack of matrices has those of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .bitmask import DIMENSIONS, TYPES


MAGIC = int.from_bytes(b"DSAWHOL1", "little")
_FACTS = 9
LARGEST = 8 * (_FACTS + DIMENSIONS)  # bytes of a header


@dataclass(frozen=True)
class WholeHeader:
    """What a packed tensor of whole numbers says of itself; attributes as in the table of the module."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: int
    bits: int
    group: int
    places: int
    scale_dtype: torch.dtype
    exchanged: bool = False

    @property
    def size(self) -> int:
        """Weights, zeros included."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of what is held."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.exchanged else self.shape
        return math.prod(shape[:-1]), shape[-1]

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Rows and groups."""
        rows, columns = self.matrix
        return rows, -(-columns // self.group) if self.group else 1

    @property
    def mask(self) -> slice:
        """The bytes of the mask."""
        start = 8 * (_FACTS + len(self.shape))
        return slice(start, start + -(-self.size // 8))

    @property
    def values(self) -> slice:
        """The bytes of the numbers."""
        start = padded(self.mask.stop)
        return slice(start, start + self.places)

    @property
    def scales(self) -> slice:
        """The bytes of the scales."""
        start = padded(self.values.stop)
        return slice(start, start + math.prod(self.scales_shape) * self.scale_dtype.itemsize)

    @property
    def bytes(self) -> int:
        """Bytes of the packed tensor."""
        return padded(self.scales.stop)

    @property
    def facts(self) -> list[int]:
        """The numbers of the header."""
        types = TYPES.index(self.dtype), TYPES.index(self.scale_dtype)
        first = [MAGIC, types[0], self.kept, len(self.shape), self.bits, self.group, self.places, types[1]]
        return [*first, int(self.exchanged), *self.shape]


def read_whole(start: bytes, length: int, name: str = "tensor") -> WholeHeader | None:
    """The header of a packed tensor of `length` bytes from its first `LARGEST` bytes; `None` if it is none of these.

    Raises:
        ValueError: it has the mark of one, but its parts cannot be what they say; before memory is taken for what it
            promises, as weights are never more than 8 per byte of the tensor.
    """
    facts = np.frombuffer(start[: min(len(start), LARGEST) // 8 * 8], "<i8").tolist()
    if len(facts) < _FACTS or facts[0] != MAGIC:
        return None
    _, code, kept, dimensions, bits, group, places, scale_code, exchanged = facts[:_FACTS]
    shape = tuple(facts[_FACTS : _FACTS + dimensions]) if 2 <= dimensions <= DIMENSIONS else ()
    known = 0 <= code < len(TYPES) and 0 <= scale_code < len(TYPES) and bits in (4, 8) and exchanged in (0, 1)
    if not known or len(shape) != dimensions:
        raise ValueError(
            f"{name} is damaged, or newer than this optimum-dsa: a packed tensor of type {code} in {dimensions} "
            f"dimensions, with numbers of {bits} bits."
        )
    header = WholeHeader(TYPES[code], shape, kept, bits, group, places, TYPES[scale_code], bool(exchanged))
    # In Python, whose numbers do not overflow: a shape of 2⁶³ · 2 is not 0.
    fits = min(*shape, kept, group, places) >= 0 and kept <= header.size and header.bytes == length
    # Of 4 bits, a row of an odd number of weights leaves half a byte.
    least = kept if bits == 8 else -(-kept // 2)
    if not fits or not least <= places <= (kept if bits == 8 else least + header.matrix[0]):
        raise ValueError(
            f"{name} is damaged: its header says shape {shape} with {kept} weights kept in {places} bytes, which does "
            f"not fit into its {length} bytes; download or convert the checkpoint again."
        )
    return header


def padded(length: int) -> int:
    """The next multiple of 8."""
    return -(-length // 8) * 8
