"""The processes of a distributed run, which work on one model together: who they are, and what they tell each other.

Every step that they take together begins with `Ranks.gather`, which carries values and errors: what fails on one
process is raised on all of them there, and nobody waits for who has gone.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .devices import process_state
from .launched import process_count


logger = logging.getLogger(__name__)


class LostRanksError(ConnectionError):
    """Another process of the run is gone, or does something else."""


class Ranks:
    """One of `count` processes, number `index`; alone by default, and then nothing is sent.

    Attributes:
        index (`int`): number 0 reads and writes what there is one of: checkpoints, reports, logs.
        count (`int`): how many there are.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self._lost = False

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def alone(self) -> bool:
        return self.count == 1

    def gather(self, value: Any = None, error: Exception | None = None) -> list:
        """What every process calls this with, in their order; or the first `error` of one, raised on all of them."""
        if self.alone:
            if error is not None:
                raise error
            return [value]
        found: list[Any] = [None] * self.count
        with self._connected():
            torch.distributed.all_gather_object(found, (value, None if error is None else _sendable(error)))
        failed = {rank: other for rank, (_, other) in enumerate(found) if other is not None}
        if failed:
            rank, other = next(iter(failed.items()))
            if error is None:
                error = other
                error.args = (f"on rank {rank} of {self.count}: {other}",)
            error.known_to_all = True
            raise error
        return [value for value, _ in found]

    def of_first(self, value: Any = None) -> Any:
        """What number 0 calls this with."""
        return self.gather(value if self.is_first else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all processes do: nobody leaves before the others are done, and an error of one ends all."""
        package = logging.getLogger(__package__.partition(".")[0])
        level = package.level
        try:
            if not self.is_first:  # which says it for all
                package.setLevel(logging.ERROR)
            yield
        except Exception as error:
            if not (self.alone or self._lost or is_known(error)):
                self.gather(error=error)  # raises
            raise
        finally:
            package.setLevel(level)
        self.gather()

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Make `tensor`, of any shape and dtype, what it is on process `source`, in place."""
        if self.alone:
            return
        sent = tensor.detach().to(self.wire).contiguous()
        with self._connected():
            # As bytes, which every backend takes.
            torch.distributed.broadcast(sent.reshape(-1).view(torch.uint8), source)
        if self.index != source:
            tensor.copy_(sent)

    def gather_flat(self, mine: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The float32 vectors of all processes, of `sizes`, in their order."""
        if self.alone or not any(sizes):
            return [mine] * len(sizes)
        sent = torch.zeros(max(sizes), device=self.wire)
        sent[: len(mine)] = mine
        found = [torch.empty_like(sent) for _ in sizes]
        with self._connected():
            torch.distributed.all_gather(found, sent)
        return [each[:size] for each, size in zip(found, sizes)]

    def scatter(self, mine: Tensor | None, senders: Collection[int], size: int) -> Tensor:
        """This process's share of the vectors of `senders`, float32 of `size`: (senders, share), in their order.

        Every process calls it, and those of `senders` with their vector. No one holds more than one vector of others.
        """
        shares = self.shares(size)
        own = shares[self.index]
        found = torch.empty(len(senders) * own, device=self.wire)
        sent = found.new_empty(0) if mine is None else mine.to(self.wire)
        give = [0] * self.count if mine is None else shares
        take = [own if rank in senders else 0 for rank in range(self.count)]
        with self._connected():
            torch.distributed.all_to_all_single(found, sent, take, give)
        return found.view(len(senders), own)

    def joined(self, share: Tensor, size: int) -> Tensor:
        """The vector of `size` of which every process has its share, (share,) float32; on all of them."""
        found = torch.empty(size, device=self.wire)
        parts = found.split(self.shares(size))
        parts[self.index].copy_(share)
        for rank, part in enumerate(parts):
            if len(part):
                with self._connected():
                    torch.distributed.broadcast(part, rank)
        return found

    def shares(self, size: int) -> list[int]:
        """`size` numbers divided over the processes, as evenly as it goes."""
        return [size // self.count + (rank < size % self.count) for rank in range(self.count)]

    @property
    def wire(self) -> torch.device:
        """Where tensors have to be to be sent."""
        if "nccl" in str(torch.distributed.get_backend()):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """What a backend says when a process is gone, in words, and noted: nothing can be sent any more."""
        try:
            yield
        except torch.OutOfMemoryError:
            self._lost = True
            raise
        except RuntimeError as error:
            self._lost = True
            why = " ".join(str(error).split()) or type(error).__name__
            raise LostRanksError(
                f"rank {self.index} of {self.count} lost another process, which ended or was ended: look for its own "
                f"last message ({why:.200})."
            ) from error


ALONE = Ranks()


def current_ranks() -> Ranks:
    """The processes that `torchrun` or `accelerate launch` started with this one; `ALONE` where none did."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed and process_count() == 1:
        return ALONE  # accelerate's state is left for who trains to make
    state = process_state()
    return Ranks(state.process_index, state.num_processes) if state.num_processes > 1 else ALONE


def is_known(error: BaseException) -> bool:
    """Whether every process has raised this error, so that one of them says it for all."""
    return getattr(error, "known_to_all", False)


def _sendable(error: Exception) -> Exception:
    """The error as another process can read it."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if str(copy) == str(error):
            return copy
    except Exception:  # noqa: BLE001 - whatever an error class makes of being copied
        logger.debug("%s cannot be sent as it is.", type(error).__name__, exc_info=True)
    return RuntimeError(f"{type(error).__name__}: {error}")
