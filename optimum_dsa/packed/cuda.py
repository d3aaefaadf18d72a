"""The products of packed matrices on an NVIDIA GPU: compiled where a compiler is, used where measured to be faster.

Importing this registers them. Each call asks the table of this card: milliseconds of every way to cut a kernel's
work, of unpacking a tile of rows after the other, and of a dense weight, by shape and batch. What is not in the table
is measured at its first call, which takes some hundredths of a second; and a kernel whose product is not that of
PyTorch is never used. Without a GPU, or without a library and leave to compile one ([`allowed`]), everything is as if
this file were not there.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from . import nvcc, ops
from .masked import BATCH, Masked, batch_of
from .measured import Table
from .ops import TILE
from .two_of_four import BYTES, dense_rows, linear_24, reference_rows


logger = logging.getLogger(__name__)
# Ways to cut the work of two_of_four.cu: kind of kernel, tiles of 16 rows in a block, blocks that stay on a
# multiprocessor. Each of them was the fastest of some shape on an H200.
WAYS = {
    "few ahead": (0, 1, 3),
    "few ahead, a block for each": (0, 1, 0),
    "more ahead": (1, 1, 2),
    "more ahead, 2 tiles": (1, 2, 2),
    "16 warps": (2, 1, 1),
    "16 warps, 2 tiles": (2, 2, 1),
    "16 warps, 4 tiles": (2, 4, 1),
}
PARTS = 8  # blocks that share the columns of a tile, at most
_BITS = {bytes: bits for bits, bytes in BYTES.items()}
_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
TILE_WEIGHTS = 2**24  # that are dense at once in bfloat16, 32 MiB: fewer rows would leave a GPU waiting for its calls
_MASKED = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}


class Kernels:
    """A compiled library, the card (or what stands for it) that runs it, and what was measured there.

    Args:
        library: file that [`nvcc.build`] made.
        multiprocessors, shared: how many there are, and the bytes of shared memory of one and of one block.
        early: whether a kernel may begin while the one before it ends (compute capability 9.0).
        table: JSON file of what was measured on this card; `None`: nothing is measured, and the first way is taken.
    """

    def __init__(
        self, library: Path, multiprocessors: int, shared: tuple[int, int], early: bool, table: Path | None = None
    ):
        functions = ctypes.CDLL(str(library))
        self.function, self.unpack = functions.optimum_dsa_two_of_four, functions.optimum_dsa_unpack
        self.function.argtypes = [_POINTER] * 6 + [_INT] * 11 + [_POINTER]
        self.unpack.argtypes = [_POINTER] * 5 + [_INT] * 6 + [_POINTER]
        self.trusted: dict[str, bool] = {}
        self.multiprocessors, self.shared, self.early = multiprocessors, shared, early
        self.table = Table(table)
        self.masked = Masked(functions.optimum_dsa_masked, multiprocessors, shared, early, self.table)
        self.rooms: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    def linear(self, input: Tensor, groups: Tensor, scales: Tensor | None, rows: int) -> Tensor:
        """input · Wᵀ, (..., columns) -> (..., rows), the fastest way that was measured."""
        columns = input.shape[-1]
        batch = input.numel() // columns if columns else 0
        taken = input.dtype == torch.bfloat16 and 1 <= batch <= BATCH and rows >= 1
        if not taken or (way := self.way(input, groups, scales, rows)) is None:
            return by_tiles(
                input, rows, lambda first, last: dense_rows(groups, scales, columns, first, last, input.dtype)
            )
        output = input.new_empty(*input.shape[:-1], rows)
        self.run(way, input, groups, scales, output)
        return output

    def way(self, input: Tensor, groups: Tensor, scales: Tensor | None, rows: int) -> str | None:
        """The fastest way by the table, measured now if it is not there; `None` where unpacking is faster."""
        key = self.key(groups, rows, input)
        if key not in self.table.rows:
            if self.table.file is None or (input.is_cuda and torch.cuda.is_current_stream_capturing()):
                return next((name for name in WAYS if self.fits(name, input, groups, rows)), None)
            self.measure(input, groups, scales, rows)
        return self.table.fastest(key, WAYS)

    @staticmethod
    def key(groups: Tensor, rows: int, input: Tensor) -> str:
        """The row of the table: bits, shape, and the batch, of which 3 is measured as 4, and 5 to 7 as 8."""
        return f"2:4, {_BITS[groups.shape[-1]]} bits, {rows} x {input.shape[-1]}, batch {batch_of(input)}"

    def measure(self, input: Tensor, groups: Tensor, scales: Tensor | None, rows: int) -> dict[str, float]:
        """Milliseconds of every way, of unpacking and of a dense weight, at the batch of `input`, into the table."""
        columns = input.shape[-1]
        # Of its own: the first call's input may be anything, even zeros.
        x = torch.randn(batch_of(input), columns, generator=torch.Generator().manual_seed(0)).to(input)
        tiles = (
            reference_rows(groups, scales, columns, first, min(first + TILE, rows), x.dtype)
            for first in range(0, rows, TILE)
        )
        weight, output = torch.cat(list(tiles)), x.new_empty(len(x), rows)
        runs = {
            name: partial(self.run, name, x, groups, scales, output)
            for name in WAYS
            if self.fits(name, x, groups, rows)
        }
        unpacked = partial(
            by_tiles, x, rows, lambda first, last: dense_rows(groups, scales, columns, first, last, x.dtype)
        )
        dense = partial(torch.nn.functional.linear, x, weight)
        key = self.key(groups, rows, input)
        return self.table.measure(key, runs, output, dense(), {"unpacked": unpacked, "dense": dense})

    def rows_of(
        self,
        parts: tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, int],
        bits: int,
        columns: int,
        first: int,
        last: int,
        reference: Callable[[], Tensor],
    ) -> Tensor:
        """Dense rows, (last - first, columns) bfloat16; at the first call of a kind compared with the `reference`.

        Args:
            parts: mask (`None`: values are groups of `TwoOfFour`), values, starts, scales, group.
        """
        *tensors, group = parts
        kind = f"{bits} bits, {'2:4' if tensors[0] is None else 'anywhere'}"
        if not self.trusted.get(kind, True):
            return reference()
        device = tensors[1].device
        found = torch.empty(last - first, columns, dtype=torch.bfloat16, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if found.is_cuda else 0
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (*tensors, found)]
        width = 0 if tensors[3] is None else tensors[3].shape[1]
        said = self.unpack(*pointers, columns, first, last - first, bits, width, group, stream)
        if kind in self.trusted and not said or (found.is_cuda and torch.cuda.is_current_stream_capturing()):
            return found
        expected = reference()
        self.trusted[kind] = not said and torch.equal(found, expected)
        if not self.trusted[kind]:
            logger.warning(
                "Unpacking (%s) ended with error %d, or not as in PyTorch, which serves from now on.", kind, said
            )
        return expected

    def fits(self, way: str, input: Tensor, groups: Tensor, rows: int) -> bool:
        """Whether the work can be cut so."""
        return self.parts(way, rows, input.shape[-1], input.numel() // input.shape[-1]) is not None

    @lru_cache(maxsize=4096)  # noqa: B019 - one object a card, for as long as the process lives
    def parts(self, way: str, rows: int, columns: int, batch: int) -> int | None:
        """Of how many blocks the columns of a tile have to be, so that the input fits into shared memory."""
        for parts in range(1, PARTS + 1):
            said = self.function(*[None] * 6, *self.cut(way, rows, columns, batch, 16, parts), None)
            if said == 0:
                return parts
        return None

    def cut(self, way: str, rows: int, columns: int, batch: int, bits: int, parts: int) -> tuple[int, ...]:
        """The whole numbers that the library takes."""
        kind, high, resident = WAYS[way]
        whole, block = self.shared
        # Of each block's memory the system takes 1024 bytes.
        limit = min(block, whole // (resident or 3) - 1024)
        numbers = (rows, columns, batch, bits, kind, high, parts, resident, self.multiprocessors, limit, self.early)
        return tuple(map(int, numbers))

    def run(self, way: str, input: Tensor, groups: Tensor, scales: Tensor | None, output: Tensor) -> None:
        """One kernel, whose product is in `output` when the stream has come to it."""
        columns, rows = input.shape[-1], output.shape[-1]
        batch, bits = input.numel() // columns, _BITS[groups.shape[-1]]
        # The kernel loads 16 bytes at once.
        input = input.contiguous()
        if input.data_ptr() % 16:
            input = input.clone()
        parts = self.parts(way, rows, columns, batch)
        stream = torch.cuda.current_stream(input.device).cuda_stream if input.is_cuda else 0
        sums, arrived = (None, None) if parts == 1 else self.room(input, stream, parts * batch * rows, len(groups))
        tensors = (groups, scales, input, output, sums, arrived)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        said = self.function(*pointers, *self.cut(way, rows, columns, batch, bits, parts), stream)
        if said:
            raise RuntimeError(
                f"The kernel of 2:4 ({way}) of {rows} x {columns}, batch {batch}, ended with error {said}"
                f"{f' (CUDA {said - 1000})' if said >= 1000 else ''}; unset OPTIMUM_DSA_JIT to do without it."
            )

    def room(self, input: Tensor, stream: int, floats: int, counters: int) -> tuple[Tensor, Tensor]:
        """Sums of parts, and counters, which are zero between two kernels; of a stream, whose kernels take turns."""
        device = input.device
        sums, arrived = self.rooms.get((device, stream), (None, None))
        if input.is_cuda and torch.cuda.is_current_stream_capturing():
            # Of its own, which the graph makes zero: nobody knows which graph will run first.
            sums = torch.empty(floats, dtype=torch.float32, device=device)
            return sums, torch.zeros(counters, dtype=torch.int32, device=device)
        if sums is None or len(sums) < floats or len(arrived) < counters:
            sums = torch.empty(max(floats, 2**20), dtype=torch.float32, device=device)
            arrived = torch.zeros(max(counters, 2**12), dtype=torch.int32, device=device)
            self.rooms[device, stream] = sums, arrived
        return sums, arrived


@cache
def kernels(device: torch.device) -> Kernels | None:
    """The kernels for a card; `None` where none are there and may be compiled, or the card is older than sm_80."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(device)
    if (card.major, card.minor) < (8, 0):
        return None
    try:
        library = nvcc.library_for(f"{card.major}{card.minor}")
    except (RuntimeError, OSError) as error:
        logger.warning("Packed matrices are multiplied without kernels on %s: %s", card.name, error)
        return None
    if library is None:
        return None
    shared = (card.shared_memory_per_multiprocessor, card.shared_memory_per_block_optin)
    name = "".join(letter if letter.isalnum() else "-" for letter in card.name)
    digest = library.stem.split("-")[1]
    table = nvcc.cache_folder() / f"table-{name}-{digest}-torch{torch.__version__}.json"
    return Kernels(library, card.multi_processor_count, shared, card.major >= 9, table)


def by_tiles(input: Tensor, rows: int, dense: Callable[[int, int], Tensor]) -> Tensor:
    """input · Wᵀ, (..., columns) -> (..., rows), of rows that `dense(first, last)` makes, a tile of them at a time."""
    step = max(TILE_WEIGHTS // max(input.shape[-1], 1) // TILE, 1) * TILE
    if rows <= step:
        return torch.nn.functional.linear(input, dense(0, rows))
    output = input.new_empty(*input.shape[:-1], rows)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        output[..., first:last] = torch.nn.functional.linear(input, dense(first, last))
    return output


def unpacked(input: Tensor, mask: Tensor, values: Tensor, starts: Tensor, scales: Tensor | None, group: int) -> Tensor:
    """input · Wᵀ of a packed matrix, (..., columns) -> (..., rows), a tile of dense rows at a time."""
    parts = (mask, values, starts, scales, group, input.shape[-1])
    return by_tiles(input, len(starts) - 1, lambda first, last: ops.dense_rows(*parts, first, last, input.dtype))


def _linear_24(input, groups, scales, rows):
    found = kernels(input.device)
    return (linear_24 if found is None else found.linear)(input, groups, scales, rows)


def _dense_rows_24(groups, scales, columns, first, last, dtype):
    found, reference = kernels(groups.device), partial(reference_rows, groups, scales, columns, first, last, dtype)
    if found is None or dtype != torch.bfloat16:
        return reference()
    return found.rows_of((None, groups, None, scales, 0), _BITS[groups.shape[-1]], columns, first, last, reference)


def _linear(input, mask, values, starts, scales, group):
    found, parts = kernels(input.device), (mask, values, starts, scales, group)
    if found is None:
        return torch.ops.optimum_dsa.linear_reference(input, *parts)
    return found.masked.linear(input, parts, lambda input: unpacked(input, *parts))


def _dense_rows(mask, values, starts, scales, group, columns, first, last, dtype):
    parts, found = (mask, values, starts, scales, group), kernels(mask.device)
    reference = partial(torch.ops.optimum_dsa.dense_rows_reference, *parts, columns, first, last, dtype)
    if found is None or dtype != torch.bfloat16 or values.dtype not in _MASKED:
        return reference()
    return found.rows_of(parts, _MASKED[values.dtype], columns, first, last, reference)


_LIBRARY = torch.library.Library("optimum_dsa", "IMPL")
for _name, _product in (
    ("linear", _linear),
    ("linear_24", _linear_24),
    ("dense_rows", _dense_rows),
    ("dense_rows_24", _dense_rows_24),
):
    _LIBRARY.impl(_name, _product, "CUDA")
