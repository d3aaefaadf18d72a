"""What decoding reads from memory: bytes of a model for each token, and how many this machine reads in a second."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..model.adapters import inner_model
from ..model.experts import expert_counts
from ..model.parameters import count_parameters
from ..packed.experts import PackedStack
from ..packed.linear import PackedModule
from ..pruning.structured.widths.costs import experts_met


PROBE = 2**28  # bytes that a measurement of the memory reads at least
_CACHE = 2**23  # bytes a core, of which the measurement reads more: what all caches together may hold


def held(model: nn.Module) -> dict[int, Tensor]:
    """Every parameter and buffer once, by its id."""
    return {id(value): value for value in (*model.parameters(), *model.buffers())}


def packed_bytes(model: nn.Module) -> int | None:
    """Bytes that the parameters and buffers of packed matrices take; `None` where none is packed."""
    packed = _packed(model)
    return sum(value.nbytes for module in packed for value in _own(module)) if packed else None


def weights_in(model: nn.Module) -> int:
    """How many weights `model` has: its parameters, and what packed matrices stand for."""
    return count_parameters(model) + sum(module.in_features * module.out_features for module in _packed(model))


def _packed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PackedModule)]


def weights_read(model: nn.Module, batch_size: int = 1) -> int:
    """Bytes of weights that a step of writing reads, of which every sequence gets a token: each matrix as it is held.

    Of an embedding a row is read, which is nothing, but where it is the matrix of the head as well. Of experts as many
    are counted as the tokens of a step can meet at the most.
    """
    tables = {id(value) for part in model.modules() if isinstance(part, nn.Embedding) for value in _own(part)}
    others = {id(value) for part in model.modules() if not isinstance(part, nn.Embedding) for value in _own(part)}
    inner = inner_model(model)
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    looked_up = tables - others - ({id(value) for value in _own(head)} if head is not None else set())
    shares, met = {}, experts_met(inner)
    for part in model.modules():
        counts = {part.experts} if isinstance(part, PackedStack) else expert_counts(part)
        if met and counts:
            share = min(batch_size * met / max(counts), 1.0)
            shares |= {id(value): share for value in (*part.parameters(), *part.buffers())}
    read = (value.nbytes * shares.get(key, 1.0) for key, value in held(model).items() if key not in looked_up)
    return round(sum(read))


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


class Memory:
    """The memory of a device, as fast as it is at the best of several times.

    Attributes:
        bandwidth (`float`, *optional*): bytes in a second that a sum read, or that a copy read and wrote, whichever
            was more; `None` before [`Memory.measure`], and where there is no room for it.
    """

    def __init__(self, device: torch.device | str):
        self.device, self.bandwidth = torch.device(device), None
        self.size = max(PROBE, _CACHE * (os.cpu_count() or 1) if self.device.type == "cpu" else 4 * PROBE)

    @torch.inference_mode()
    def measure(self) -> None:
        """Once more: the most of all times counts."""
        # out of room is no reason to end what else is measured
        with suppress(RuntimeError, MemoryError):
            source = torch.ones(self.size // 8, dtype=torch.int64, device=self.device)
            target = torch.ones_like(source)
            for bytes_moved, work in ((self.size, source.sum), (2 * self.size, lambda: target.copy_(source))):
                self._wait()
                start = time.perf_counter()
                work()
                self._wait()
                self.bandwidth = max(bytes_moved / (time.perf_counter() - start), self.bandwidth or 0.0)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
