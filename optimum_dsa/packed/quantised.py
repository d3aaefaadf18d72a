"""Tensors that lie on a grid of whole numbers as bytes: bit for bit, in a half or a quarter of what their values take.

A tensor that lies on none is stored as mask and values, see `bitmask.py`: nothing is lost by being stored.
"""

from __future__ import annotations

from torch import Tensor

from . import bitmask
from .grid import BITS, grid_in
from .matrix import PackedMatrix
from .whole import LARGEST, WholeHeader, read_whole


LARGEST = max(LARGEST, bitmask.LARGEST)  # bytes of a header


def pack(tensor: Tensor) -> Tensor | None:
    """A tensor on the CPU in the fewest bytes that hold it, (bytes,) uint8; `None` where the tensor itself does.

    Mask, numbers and scales where its rows lie on a grid (of all its dimensions but the last; or with the last two
    exchanged, as of a matrix that is stored transposed); else mask and values.
    """
    if tensor.dim() < 2 or not tensor.numel() or not bitmask.can_pack(tensor.dtype, tuple(tensor.shape)):
        return bitmask.pack(tensor)
    lies = next(((bits, found) for bits in BITS if (found := grid_in(tensor.detach(), bits)) is not None), None)
    if lies is None:
        return bitmask.pack(tensor)
    bits, (grid, exchanged) = lies
    found = PackedMatrix.of_grid(grid, bits).to_bytes(tensor.dtype, tuple(tensor.shape), exchanged)
    header = bitmask.Header(tensor.dtype, tuple(tensor.shape), int(grid.numbers.count_nonzero()))
    # Of very few kept weights, scales take more than values.
    return found if len(found) < min(header.bytes, tensor.nbytes) else bitmask.pack(tensor)


def read_header(start: bytes, length: int, name: str = "tensor") -> WholeHeader | bitmask.Header | None:
    """What the first `LARGEST` bytes of a packed tensor of `length` bytes say; `None` if it is none of both.

    Raises:
        ValueError: it has the mark of one, but its parts cannot be what they say.
    """
    return read_whole(start, length, name) or bitmask.read_header(start, length, name)


def unpack(packed: Tensor, name: str = "tensor") -> Tensor:
    """The tensor that was packed as `packed`, (bytes,) uint8, on its device.

    Raises:
        ValueError: `packed` is no packed tensor, or damaged.
    """
    header = read_whole(packed[:LARGEST].cpu().numpy().tobytes(), len(packed), name)
    if header is None:
        return bitmask.unpack(packed, name)
    dense = PackedMatrix.of_header(packed, header, name).dense(header.dtype)
    if not header.exchanged:
        return dense.view(header.shape)
    return dense.view(*header.shape[:-2], header.shape[-1], header.shape[-2]).mT.contiguous()
