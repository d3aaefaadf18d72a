"""One matrix without its zeros, as the operators take it: mask, values, where rows begin, and scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bitmask
from .grid import BITS, Grid, grid_of, to_grid
from .ops import TILE, dense_rows, linear, ones
from .whole import LARGEST, WholeHeader, read_whole


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
    def smallest(cls, dense: Tensor) -> PackedMatrix:
        """A dense matrix, (rows, columns), in the fewest bytes that are bit for bit what it was.

        Of one whose rows lie on a grid they are whole numbers and scales.
        """
        found = next(((bits, grid) for bits in BITS if (grid := grid_of(dense.detach(), bits)) is not None), None)
        floats = cls.of(dense)
        whole = None if found is None else cls.of_grid(found[1], found[0])
        # Of very few kept weights, scales take more than values.
        return floats if whole is None or whole.nbytes >= floats.nbytes else whole

    @classmethod
    def quantised(
        cls, dense: Tensor, bits: int, group: int = 0, scales: str = "mse", importance: Tensor | None = None
    ) -> PackedMatrix:
        """A dense matrix, (rows, columns), without its zeros, the others as whole numbers of 4 or 8 `bits`.

        One that lies on a grid of these bits is held as it is, in its own groups; of any other, every weight becomes
        the nearest on a grid, see [`~packed.grid.to_grid`], which says what `group`, `scales`, `importance` are.
        """
        return cls.of_grid(grid_of(dense, bits) or to_grid(dense, bits, group, scales, importance), bits)

    @classmethod
    def of_grid(cls, grid: Grid, bits: int) -> PackedMatrix:
        """The matrix that lies on `grid`, its numbers held in 4 or 8 `bits` each."""
        rows, columns = shape = tuple(grid.numbers.shape)
        mask = packed_bits(grid.numbers != 0)
        starts, step, parts = row_starts(mask, shape, even=bits == 4), max(2**20 // max(columns, 1), 1), []
        for first in range(0, rows, step):
            part = grid.numbers[first : first + step]
            parts.append(part[part != 0] if bits == 8 else _halves(part))
        values = (
            torch.cat(parts) if parts else grid.numbers.new_empty(0, dtype=torch.int8 if bits == 8 else torch.uint8)
        )
        return cls(mask, values, starts, shape, grid.scales, grid.group)

    @classmethod
    def from_bytes(cls, packed: Tensor, name: str = "tensor", turned: bool = False) -> PackedMatrix:
        """A packed tensor of a checkpoint, (bytes,) uint8, of a matrix or of several (experts), which then are below
        each other: views of it, and no copy but of scales.

        One that is stored the other way round is packed anew.

        Args:
            turned: whether the matrix is the tensor with its last two dimensions exchanged.

        Raises:
            ValueError: it is no packed matrix, or damaged.
        """
        start = packed[: max(LARGEST, bitmask.LARGEST)].cpu().numpy().tobytes()
        header = read_whole(start, packed.numel(), name) or bitmask.read_header(start, packed.numel(), name)
        if header is None or len(header.shape) not in (2, 3):
            raise ValueError(f"{name} is no packed matrix.")
        stored_turned = isinstance(header, WholeHeader) and header.exchanged
        if isinstance(header, WholeHeader):
            found = cls.of_header(packed, header, name)
        else:
            mask, values = packed[header.mask], packed[header.values].view(header.dtype)
            shape = (math.prod(header.shape[:-1]), header.shape[-1])
            try:
                found = cls(mask, values, row_starts(mask, shape), shape)
            except ValueError as error:
                raise ValueError(f"{name} is damaged. {error}") from None
        if turned == stored_turned:
            return found
        # Rows of one are columns of the other, and whole numbers have the scales of rows.
        *before, rows, columns = header.shape
        dense = found.dense(header.dtype).view(*before, *((columns, rows) if stored_turned else (rows, columns))).mT
        return cls.smallest(dense.reshape(-1, dense.shape[-1]))

    @classmethod
    def of_header(cls, packed: Tensor, header: WholeHeader, name: str = "tensor") -> PackedMatrix:
        """The rows of a packed tensor of whole numbers, (bytes,) uint8, of any dimensions.

        Raises:
            ValueError: it is damaged.
        """
        mask, values = packed[header.mask], packed[header.values]
        starts = row_starts(mask, header.matrix, even=header.bits == 4)
        if header.size % 8 and int(mask[-1]) >> header.size % 8:
            raise ValueError(f"{name} is damaged: its mask keeps weights behind its last.")
        # Where two numbers share a byte, one more in a row may have a place.
        if (kept := sum(int(ones(part).sum(dtype=torch.int64)) for part in mask.split(2**24))) != header.kept:
            raise ValueError(f"{name} is damaged: its mask keeps {kept} weights, and its header says {header.kept}.")
        scales = packed[header.scales].view(header.scale_dtype).float().view(header.scales_shape)
        values = values.view(torch.int8) if header.bits == 8 else values
        try:
            return cls(mask, values, starts, header.matrix, scales, header.group)
        except ValueError as error:
            raise ValueError(f"{name} is damaged. {error}") from None

    def to_bytes(
        self, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None, exchanged: bool = False
    ) -> Tensor | None:
        """As a checkpoint holds it, (bytes,) uint8 on the CPU; `None` where the dense matrix would be smaller.

        Args:
            dtype, shape, exchanged: what whole numbers become when they are unpacked, see the table of `whole.py`: by
                default this matrix in float32.
        """
        if self.scales is None:
            return bitmask.pack(self.dense().cpu())
        bits = 8 if self.values.dtype == torch.int8 else 4
        short = torch.equal(self.scales.bfloat16().float(), self.scales)
        kept = int(row_starts(self.mask, self.shape)[-1])
        header = WholeHeader(
            *(dtype or torch.float32, shape or self.shape, kept, bits, self.group, len(self.values)),
            *(torch.bfloat16 if short else torch.float32, exchanged),
        )
        found = torch.zeros(header.bytes, dtype=torch.uint8)
        facts = torch.tensor(header.facts)
        scales = self.scales.to(header.scale_dtype).contiguous().flatten()
        for place, part in (
            (slice(0, 8 * len(facts)), facts),
            (header.mask, self.mask),
            (header.values, self.values),
            (header.scales, scales),
        ):
            found[place] = part.view(torch.uint8).cpu()
        return found

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


def _halves(numbers: Tensor) -> Tensor:
    """The numbers of rows, (rows, columns) int8, that are not 0, two a byte, every row at a byte: (bytes,) uint8."""
    kept = numbers != 0
    counts = kept.sum(dim=1)
    even = counts + counts % 2
    # Where each is held: as many places on as rows before it have half a byte left.
    on = torch.cat([even.new_zeros(1), (even - counts).cumsum(0)[:-1]]).repeat_interleave(counts)
    both = numbers.new_zeros(int(even.sum()))
    both[torch.arange(len(on), device=on.device) + on] = numbers[kept]
    both = (both.view(torch.uint8) & 15).view(-1, 2)
    return both[:, 0] | both[:, 1] << 4


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
