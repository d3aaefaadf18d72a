"""Where the activations between two blocks are kept, batch by batch: in memory, or in a file without a name.

    held = held_in("disk")     # what a walk is given: called, it makes a sequence of tensors
    hidden = held(batches)     # written one after the other
    hidden[3]                  # read into memory, and let go of with its last name

The file goes with the process, however that ends: it has no name by which it could be left behind.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import torch
from torch import Tensor


PLACES = ("memory", "disk")

# Called with tensors of any shapes, or `None` for what is not known yet: a sequence of them that can be changed.
Held = Callable[..., MutableSequence]


_FOLDER: ContextVar[str | Path | None] = ContextVar("folder", default=None)


def held_in(place: str) -> Held:
    """What makes the sequences that a walk keeps its activations in: lists, or `OnDisk`, all in one file.

    Args:
        place: a name of `PLACES`; "disk" is that of the folder that was named (`spilled_to`), or of temporary files.
    """
    return list if place == "memory" else partial(OnDisk, Spill(_FOLDER.get()))


@contextmanager
def spilled_to(folder: str | Path | None) -> Iterator[None]:
    """Inside, activations on the disk are on that of `folder`, where one is named, which is there when they come."""
    before = _FOLDER.set(folder or _FOLDER.get())
    try:
        yield
    finally:
        _FOLDER.reset(before)


class Spill:
    """A file without a name that tensors are written to; what nobody asks for any more is written over."""

    def __init__(self, folder: str | Path | None = None):
        self.bytes = 0  # that the file has grown to
        self._folder = folder
        self._file = None  # made with the first tensor: a walk that runs nothing needs none
        self._free: dict[int, list[int]] = {}  # bytes of a place -> where such places are free

    def put(self, tensor: Tensor) -> _Place:
        """Write a tensor of any shape; what it can be read back by."""
        # In the order in which it lies in memory: kernels choose their way by strides, and with it last bits.
        order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
        data = tensor.detach().permute(order).cpu().contiguous()
        place = _Place(self, self._start(data.nbytes), order, data.shape, data.dtype, tensor.device)
        weakref.finalize(place, self._free.setdefault(data.nbytes, []).append, place.start)
        self._move("write", data, place.start)
        return place

    def read(self, data: Tensor, start: int) -> None:
        """Fill a contiguous tensor on the CPU with what was written at `start`."""
        self._move("readinto", data, start)

    def _start(self, size: int) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - as long as this is
        if free := self._free.get(size):
            return free.pop()
        self.bytes += size
        return self.bytes - size

    def _move(self, how: str, data: Tensor, start: int) -> None:
        """Have a method of the file move all bytes of a contiguous tensor; a system takes at most 2 GiB at once."""
        self._file.seek(start)
        rest = memoryview(data.reshape(-1).view(torch.uint8).numpy())
        while len(rest):
            moved = getattr(self._file, how)(rest)
            if not moved:
                raise OSError(f"Activations on the disk end at byte {self._file.tell()} of their file.")
            rest = rest[moved:]


class _Place:
    """Where a tensor lies in a `Spill`; free for another one once nothing refers to it."""

    def __init__(self, spill: Spill, start: int, order: list[int], shape: torch.Size, dtype, device: torch.device):
        self.spill, self.start, self.order = spill, start, order
        self.shape, self.dtype, self.device = shape, dtype, device

    def tensor(self) -> Tensor:
        """What was written, with its strides, on its device."""
        data = torch.empty(self.shape, dtype=self.dtype)
        self.spill.read(data, self.start)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return data.to(self.device).permute(back)


class OnDisk(MutableSequence):
    """Tensors of any shapes, each of which is read when it is asked for; a copy refers to the same ones."""

    def __init__(self, spill: Spill, values: Iterable[Tensor | None] = ()):
        self._spill = spill
        self._places = [self._put(value) for value in values]

    def _put(self, value: Tensor | None) -> _Place | None:
        return None if value is None else self._spill.put(value)

    def copy(self) -> OnDisk:
        found = OnDisk(self._spill)
        found._places = list(self._places)
        return found

    def __getitem__(self, number: int) -> Tensor | None:
        place = self._places[number]
        return None if place is None else place.tensor()

    def __setitem__(self, number: int, value: Tensor | None) -> None:
        self._places[number] = None  # so that what takes its place may lie there
        self._places[number] = self._put(value)

    def __delitem__(self, number: int) -> None:
        del self._places[number]

    def insert(self, number: int, value: Tensor | None) -> None:
        self._places.insert(number, self._put(value))

    def __len__(self) -> int:
        return len(self._places)
