"""Mask and kept values times few vectors on a GPU, by `kernels/cuda/masked.cu`: how work is cut, when it is used."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from .measured import Table


BATCH = 8  # rows of the input for which a kernel is asked at most
# Ways to cut the work: warps of a block, blocks that stay on a multiprocessor.
WAYS = {
    "16 warps": (16, 1),
    "8 warps, 2 blocks": (8, 2),
    "12 warps, 2 blocks": (12, 2),
    "4 warps, 4 blocks": (4, 4),
    "8 warps": (8, 1),
}
_BITS = {torch.bfloat16: 16, torch.float16: 16, torch.int8: 8, torch.uint8: 4}
_INT, _POINTER = ctypes.c_int, ctypes.c_void_p

Parts = tuple[
    Tensor, Tensor, Tensor, Tensor | None, int
]  # mask, values, starts, scales, group, as operators take them


class Masked:
    """The kernel on one card.

    Args:
        function: `optimum_dsa_masked` of the library.
        multiprocessors, shared, early: of the card, see [`~packed.cuda.Kernels`].
        table: what was measured on it.
    """

    def __init__(self, function, multiprocessors: int, shared: tuple[int, int], early: bool, table: Table):
        self.function, self.table = function, table
        self.multiprocessors, self.shared, self.early = multiprocessors, shared, early
        function.argtypes = [_POINTER] * 6 + [_INT] * 11 + [_POINTER]

    def linear(self, input: Tensor, parts: Parts, unpacked: Callable[[Tensor], Tensor]) -> Tensor:
        """input · Wᵀ, (..., columns) -> (..., rows): by the kernel where it was measured to beat `unpacked`."""
        if not takes(input, parts) or (way := self.way(input, parts, unpacked)) is None:
            return unpacked(input)
        output = input.new_empty(*input.shape[:-1], len(parts[2]) - 1)
        self.run(way, input, parts, output)
        return output

    def way(self, input: Tensor, parts: Parts, unpacked: Callable[[Tensor], Tensor]) -> str | None:
        """The fastest way by the table, measured now if it is not there; `None` where unpacking is faster."""
        kind = kind_of(input, parts)
        if kind not in self.table.rows:
            if self.table.file is None:
                return next(iter(self.ways(input, parts)), None)
            if input.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            self.measure(input, parts, {"unpacked": unpacked})
        return self.table.fastest(kind, WAYS)

    def measure(self, input: Tensor, parts: Parts, others: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, float]:
        """Milliseconds of every way, and of `others`, at the batch of `input`, into the table."""
        # Of its own: the first call's input may be anything, even zeros.
        x = torch.randn(batch_of(input), input.shape[-1], generator=torch.Generator().manual_seed(0)).to(input)
        output = x.new_empty(len(x), len(parts[2]) - 1)
        runs = {name: partial(self.run, name, x, parts, output) for name in self.ways(x, parts)}
        expected = torch.ops.optimum_dsa.linear_reference(x, *parts)
        others = {name: partial(other, x) for name, other in others.items()}
        return self.table.measure(kind_of(input, parts), runs, output, expected, others)

    def ways(self, input: Tensor, parts: Parts) -> list[str]:
        """Those that the work can be cut in."""
        bits, group = _BITS[parts[1].dtype], parts[4]
        return [name for name in WAYS if self._fits(name, len(parts[2]) - 1, input.shape[-1], bits, group)]

    def run(self, way: str, input: Tensor, parts: Parts, output: Tensor) -> None:
        """A kernel for each vector of the input, whose products are in `output` when the stream has come to them."""
        mask, values, starts, scales, group = parts
        rows, columns = len(starts) - 1, input.shape[-1]
        numbers = _BITS[values.dtype], input.dtype == torch.float16, 0 if scales is None else scales.shape[1], group
        stream = torch.cuda.current_stream(input.device).cuda_stream if input.is_cuda else 0
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (mask, values, starts, scales)]
        for vector, product in zip(input.reshape(-1, columns), output.view(-1, rows)):
            # The kernel loads 16 bytes at once.
            vector = vector.clone() if vector.data_ptr() % 16 else vector
            ends = vector.data_ptr(), product.data_ptr()
            said = self.function(*pointers, *ends, rows, columns, *map(int, numbers), *self._cut(way), stream)
            if said:
                raise RuntimeError(
                    f"The kernel of masks ({way}) of {rows} x {columns} ended with error {said}"
                    f"{f' (CUDA {said - 1000})' if said >= 1000 else ''}; unset OPTIMUM_DSA_JIT to do without it."
                )

    @lru_cache(maxsize=4096)  # noqa: B019 - one object a card, for as long as the process lives
    def _fits(self, way: str, rows: int, columns: int, bits: int, group: int) -> bool:
        return self.function(*[None] * 6, rows, columns, bits, 0, 0, group, *self._cut(way), None) == 0

    def _cut(self, way: str) -> tuple[int, ...]:
        """The last whole numbers that the library takes."""
        warps, resident = WAYS[way]
        whole, block = self.shared
        # Of each block's memory the system takes 1024 bytes.
        return warps, resident, self.multiprocessors, min(block, whole // resident - 1024), int(self.early)


def takes(input: Tensor, parts: Parts) -> bool:
    """Whether the kernel is for these: few vectors of 16 bits a number, values of their type or whole numbers with a
    scale a row, or for so many columns as are a power of two from 32 on."""
    _, values, starts, _, group = parts
    if input.dtype not in (torch.bfloat16, torch.float16) or values.dtype not in (
        input.dtype,
        torch.int8,
        torch.uint8,
    ):
        return False
    few = input.numel() and input.numel() // input.shape[-1] <= BATCH
    return bool(few) and len(starts) > 1 and (group == 0 or (group >= 32 and group & group - 1 == 0))


def batch_of(input: Tensor) -> int:
    """The batch that stands for that of `input` in the table: 3 is measured as 4, and 5 to 7 as 8."""
    return 1 << (input.numel() // input.shape[-1] - 1).bit_length()


def kind_of(input: Tensor, parts: Parts) -> str:
    """The row of the table: types, shape, the tenths that are kept, and the batch."""
    _, values, starts, _, group = parts
    rows, columns = len(starts) - 1, input.shape[-1]
    tenths = round(10 * values.numel() * (2 if values.dtype == torch.uint8 else 1) / (rows * columns))
    # One expert's rows come with the values of all; how many are its own, only the card knows.
    kept = f"{tenths} tenths kept" if tenths <= 10 else "an expert"
    number = {torch.int8: "8 bits", torch.uint8: "4 bits"}.get(values.dtype, "16 bits")
    types = f"{number}{f' a scale for {group}' if group else ''}, {str(input.dtype).removeprefix('torch.')}"
    return f"mask, {types}, {rows} x {columns}, {kept}, batch {batch_of(input)}"
