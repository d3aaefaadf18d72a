"""Where a block goes when its steps are done."""

from __future__ import annotations

from typing import Protocol

import torch

from ..model.walked import WalkedBlock
from .zeros import zeros_in


class Sink(Protocol):
    """Takes a finished block; the walk goes on to the next one when it has."""

    def __call__(self, walked: WalkedBlock) -> None: ...


class KeepBlocks:
    """Leaves each block where it lives (in memory, or where accelerate keeps it), and counts what is zero in it.

    Counted here and not by a step: a later step may change what an earlier one left.

    Attributes:
        zeros: weight -> how many of its entries are zero.
    """

    def __init__(self) -> None:
        self.zeros: dict[str, int] = {}

    @torch.no_grad()
    def __call__(self, walked: WalkedBlock) -> None:
        for weight in walked.weights:
            self.zeros[weight.name] = zeros_in(walked.tensor(weight))
