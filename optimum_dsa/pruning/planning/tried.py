"""What `allocation="auto"` takes before the prune: every named allocation is tried for real, on windows of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..allocation import measured_in_one_walk
from ..comparison import windows_apart
from ..configuration import AUTO, DSAConfig
from ..sections import ReconstructConfig
from ..source import held_out, step_size
from ..training import LOOKS
from .shape import ModelShape


TOP = 512  # next tokens whose probabilities the dense model is remembered by, at every position


@dataclass(frozen=True)
class Tries:
    """How many allocations are tried, each a prune, and on how many windows each is judged."""

    number: int
    windows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.windows * self.length

    def __str__(self) -> str:
        return f"{self.number} allocations are tried first, each judged on {self.windows} x {self.length} tokens"


def tries_of(config: DSAConfig, samples: int, length: int) -> Tries | None:
    """What is tried with so much calibration text; `None` where the allocation is settled."""
    number = len(measured_in_one_walk())
    return Tries(number, windows_apart(samples), length) if config.allocation == AUTO else None


def each_try(config: DSAConfig) -> DSAConfig:
    """How a prune goes by which an allocation is judged: with masks and weights, and no training of blocks."""
    return replace(config, allocation="uniform", reconstruct=ReconstructConfig(), permute=None)


def last(config: DSAConfig) -> DSAConfig:
    """How the result is pruned. Which name wins nobody knows yet: one that reads scores stands for it."""
    return replace(config, allocation=DSAConfig.allocation) if config.allocation == AUTO else config


def time_of(config: DSAConfig, tries: Tries | None, prune: Callable[[DSAConfig], float], pass_: float) -> float:
    """Seconds, or operations, of all of it, from those of a `prune` and of a forward pass over the windows apart.

    One try more stands for the walks in which scores are read and ordered. Each allocation meets the windows twice, as
    masks and as pruned.
    """
    if tries is None:
        return prune(config)
    return prune(last(config)) + (tries.number + 1) * prune(each_try(config)) + (2 * tries.number + 1) * pass_


def distilled_tokens(config: DSAConfig, samples: int, length: int) -> int:
    """Tokens of a forward pass that distillation is worth: one forward and one backward, of three in all.

    Three trials of a quarter of the steps go before, in which a rate is found.
    """
    steps, looks = config.reconstruct.distill, LOOKS * held_out(samples)
    trained = steps + 3 * max(steps // 4, 1)
    return (3 * trained * step_size(samples) + 4 * looks) * length if steps else 0


def forward_operations(shape: ModelShape, tokens: int) -> float:
    """Of a forward pass of the whole model: two for each of its weights, and the head's."""
    return 2.0 * shape.parameters * tokens
