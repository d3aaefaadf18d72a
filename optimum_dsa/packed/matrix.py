"""One matrix without its zeros, as the operators take it: mask, values, where rows begin, and scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bitmask import LARGEST, pack, read_header
from .ops import TILE, dense_rows, linear


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix of `shape` (rows, columns) whose zeros are not held.

    Attributes:
        mask (`Tensor`): (⌈rows · columns ÷ 8⌉,) uint8, one bit per weight, lowest first, 1 where it is kept.
        values (`Tensor`): (kept,) of a floating type or int8; or uint8, two numbers of 4 bits a byte.
        starts (`Tensor`): (rows + 1,) int64, at which value each row begins.
        shape (`tuple[int, int]`): rows and columns.
        scales (`Tensor`, *optional*): (rows, groups) float32, for values that are whole numbers.
        group (`int`): columns that share a scale; 0 for all of a row.

    Raises:
        ValueError: the parts do not fit each other. Operators read without looking, so that none is made of such.
    """

    mask: Tensor
    values: Tensor
    starts: Tensor
    shape: tuple[int, int]
    scales: Tensor | None = None
    group: int = 0

    def __post_init__(self):
        rows, columns = self.shape
        whole = self.values.dtype in (torch.int8, torch.uint8)
        groups = -(-columns // self.group) if self.group else 1
        if self.mask.shape != (-(-rows * columns // 8),) or self.mask.dtype != torch.uint8:
            raise ValueError(
                f"A mask of {tuple(self.mask.shape)} {self.mask.dtype} is none of {rows} x {columns} weights."
            )
        if rows * columns % 8 and int(self.mask[-1]) >> rows * columns % 8:
            raise ValueError(f"A mask of {rows} x {columns} weights has bits behind its last; download it again.")
        halves = self.values.dtype == torch.uint8
        expected = row_starts(self.mask, self.shape, even=halves)
        places = int(expected[-1]) // (2 if halves else 1)
        if not torch.equal(expected.to(self.starts.device), self.starts) or len(self.values) != places:
            raise ValueError(
                f"A mask that keeps {int(expected[-1])} weights of {rows} x {columns} does not fit {len(self.values)} "
                f"values of {self.values.dtype}; pack the matrix again, or download the checkpoint again."
            )
        if whole != (self.scales is not None) or (whole and tuple(self.scales.shape) != (rows, groups)):
            raise ValueError(
                f"Values of {self.values.dtype} of {rows} x {columns} with scales "
                f"{None if self.scales is None else tuple(self.scales.shape)}: expected "
                f"{(rows, groups) if whole else None}."
            )

    @classmethod
    def of(cls, dense: Tensor) -> PackedMatrix:
        """A dense matrix, (rows, columns) of a floating type, without its zeros; bit for bit what it was."""
        flat = dense.detach().contiguous()
        bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize]) != 0
        mask = packed_bits(bits)
        return cls(mask, flat[bits], row_starts(mask, tuple(dense.shape)), tuple(dense.shape))

    @classmethod
    def from_bytes(cls, packed: Tensor, name: str = "tensor") -> PackedMatrix:
        """A packed tensor of a checkpoint, (bytes,) uint8, of two dimensions: views of it, and no copy.

        Raises:
            ValueError: it is no packed matrix, or damaged.
        """
        header = read_header(packed[:LARGEST].cpu().numpy().tobytes(), packed.numel(), name)
        if header is None or len(header.shape) != 2:
            raise ValueError(f"{name} is no packed matrix.")
        mask, values = packed[header.mask], packed[header.values].view(header.dtype)
        return cls(mask, values, row_starts(mask, header.shape), header.shape)

    def to_bytes(self) -> Tensor | None:
        """As a checkpoint holds it, (bytes,) uint8 on the CPU; `None` where the dense matrix would be smaller."""
        return pack(self.dense().cpu())

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in (self.mask, self.values, self.starts, self.scales) if part is not None)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
        """As the operators take them."""
        return self.mask, self.values, self.starts, self.scales, self.group

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, columns) with its zeros, in `dtype` or the values' own (of whole numbers float32)."""
        dtype = dtype or (self.values.dtype if self.scales is None else torch.float32)
        rows, columns = self.shape
        whole = torch.empty(rows, columns, dtype=dtype, device=self.mask.device)
        for first in range(0, rows, TILE):
            last = min(first + TILE, rows)
            whole[first:last] = dense_rows(*self.parts, columns, first, last, dtype)
        return whole

    def linear(self, input: Tensor) -> Tensor:
        """input · Wᵀ, (..., columns) -> (..., rows)."""
        return linear(input, *self.parts)


def packed_bits(bits: Tensor) -> Tensor:
    """Bits, of any shape, eight a byte, lowest first: (⌈n ÷ 8⌉,) uint8."""
    flat = bits.flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def ones(mask: Tensor) -> Tensor:
    """How many bits are set in each byte, of any shape, uint8: pairs, then fours, then all, added side by side."""
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


def row_starts(mask: Tensor, shape: tuple[int, int], even: bool = False) -> Tensor:
    """At which value each row begins, and the last ends, of a mask, (⌈rows · columns ÷ 8⌉,): (rows + 1,) int64.

    Args:
        even: whether each begins at an even number, as two values of 4 bits share a byte.
    """
    rows, columns = shape
    counts = torch.empty(rows, dtype=torch.int64, device=mask.device)
    # So many rows that they begin at a whole byte, and little more memory than the mask.
    step = max(2**20 // max(columns, 1) // 8, 1) * 8
    for first in range(0, rows, step):
        last = min(first + step, rows)
        part = mask[first * columns // 8 : -(-last * columns // 8)]
        if columns % 8:
            bits = (part[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
            counts[first:last] = bits.flatten()[: (last - first) * columns].view(last - first, columns).sum(1)
        else:
            counts[first:last] = ones(part).view(last - first, columns // 8).sum(1)
    if even:
        counts += counts % 2
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
