"""A prune that several processes do together: what they can divide, and the blocks that one of them keeps for all."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..common.ranks import Ranks
from ..model.fingerprint import fingerprint_of_tensors
from ..model.walked import WalkedBlock
from .allocation import Allocation
from .calibration import Calibration
from .configuration import DSAConfig
from .finished import FinishedBlocks, mark_of, read_there
from .source import Known
from .steps import Step


logger = logging.getLogger(__name__)

FEW = 64  # values of a weight that tell it from another


def check_divisible(config: Any, ranks: Ranks) -> None:
    """Raise `ValueError`, before any work, where several processes cannot do together what `config` asks for."""
    if ranks.alone:
        return
    where = f"in one process, and this is one of {ranks.count}; start it without torchrun"
    if not isinstance(config, DSAConfig):
        raise ValueError(f"Structures are cut out {where}, and prune the weights of what is left with it then.")
    reconstruct = config.reconstruct
    for name, asked in (
        ("reconstruct", reconstruct.steps),
        ("distill", reconstruct.distill),
        ("permute", config.permute),
    ):
        if asked:
            raise ValueError(f"{name}={asked!r} works {where}, or leave {name} out.")
    if "regional" in config.resolved.reads | config.resolved.allocation_reads:
        raise ValueError(
            f"method {config.method!r} reads gradients of every block's outputs, which are made {where}, or choose "
            "another method."
        )


def check_alike(model: nn.Module, calibration: Known | None, config: DSAConfig, ranks: Ranks) -> None:
    """Raise `ValueError` on all processes where one was given another model, other data or settings than the first."""
    if ranks.alone:
        return
    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        hashed.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            hashed.update(parameter.detach().reshape(-1)[:FEW].float().cpu().numpy().tobytes())
    data = fingerprint_of_tensors(calibration.inputs) if isinstance(calibration, Calibration) else None
    told = ranks.gather({"model": hashed.hexdigest(), "calibration data": data, "settings": config.to_dict()})
    for rank, other in enumerate(told):
        for what, own in other.items():
            if own != told[0][what]:
                raise ValueError(
                    f"The {what} of rank {rank} of {ranks.count} differs from that of rank 0: all processes of a run "
                    "need the same model, data and settings; load them from files, or seed what is drawn."
                )
    threads = ranks.gather(torch.get_num_threads())
    if len({*threads}) > 1 and ranks.is_first:
        logger.warning("Processes compute with %s threads: their last bits may differ.", threads)


class SharedBlocks:
    """The finished blocks that the first process keeps, for all of them; has what a [`FinishedBlocks`] has.

    Args:
        own: of the first process, if blocks are kept.
    """

    def __init__(self, own: FinishedBlocks | None, ranks: Ranks):
        self.own, self.ranks = own, ranks
        known = ranks.of_first(own and (own.allocation, own.count))
        self.kept = known is not None
        self.allocation: Allocation | None
        self.allocation, self.count = known or (None, 0)

    def __bool__(self) -> bool:
        return self.kept

    def begin(self, allocation: Allocation) -> None:
        """As there, by the first process."""
        if self.own:
            self.own.begin(allocation)

    def add(self, number: int, walked: WalkedBlock, notes: Sequence[Mapping[str, Any]]) -> None:
        """As there, by the first process."""
        if self.own:
            self.own.add(number, walked, notes)
        self._read_there(number, walked)

    def restore(self, number: int, walked: WalkedBlock, steps: Sequence[Step]) -> None:
        """As there; the others are given what the first process reads."""
        known = [set(step.notes) for step in steps]
        if self.own:
            self.own.restore(number, walked, steps)
        new = [{name: note for name, note in step.notes.items() if name not in old} for step, old in zip(steps, known)]
        for step, noted in zip(steps, self.ranks.of_first(new)):
            step.notes.update(noted)
        for name, value in walked.state().items():
            value = value.clone()
            self.ranks.broadcast_(value, 0)
            walked.become({name: value})
        self._read_there(number, walked)

    def _read_there(self, number: int, walked: WalkedBlock) -> None:
        """Have the others read weights that they keep on the disk from the first one's file, where they see it."""
        path = self.own and self.own.file(number).absolute()
        path, mark = self.ranks.of_first(path and (path, mark_of(path)))
        if not self.own and mark is not None and mark_of(path) == mark:
            read_there(path, walked, walked.state())
