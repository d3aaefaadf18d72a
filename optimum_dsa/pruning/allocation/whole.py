"""What an allocator that has to run the model is given: the model, text, and what it is to be pruned to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture, Weight
from ...model.statistics import LayerStatistics
from ...model.walk import Reads, WalkedBlock
from ..unstructured.patterns import Pattern


@dataclass(frozen=True)
class Seen:
    """A model that an allocator runs, and leaves as it was.

    Attributes:
        batches: of so many sequences at most, and of the first so many, or of all: inputs of the model by name.
        target: the sparsity of the whole.
        granularity: of the units, one of `GRANULARITIES`.
        metric: (weight, statistics) -> scores, by which masks are made.
        reads: what the metric needs of calibration, "inputs" at least.
        pattern: within which sets of weights they are made.
    """

    model: nn.Module
    architecture: Architecture
    batches: Callable[[int, int | None], Sequence[Mapping[str, Tensor]]]
    target: float
    granularity: str
    metric: Callable[[Tensor, LayerStatistics | None], Tensor]
    reads: Reads
    pattern: Pattern

    @property
    def units(self) -> dict[str, tuple[Weight, ...]]:
        return self.architecture.units(self.granularity)

    def keep(self, tensor: Tensor, statistics: LayerStatistics, sparsity: float) -> Tensor:
        """The mask of a matrix, (out_features, in_features), True = keep, that removes this share of it."""
        pattern = self.pattern if self.pattern.sparsity is None else Pattern("row")
        return pattern.keep(self.metric(tensor, statistics), round(sparsity * tensor.numel()))


@dataclass(frozen=True)
class FromModel:
    """An `Allocator` that measures all units at once, on the model itself.

    Attributes:
        measure_model: what is seen -> unit -> what `propose` is given of it.
        passes: (blocks, windows) -> how many forward passes over all windows that costs, roughly; for plans.
    """

    measure_model: Callable[[Seen], dict[str, Any]]
    from_measured: Callable[[Mapping[str, Any], float, float | None], dict[str, float]]
    passes: Callable[[int, int], float]
    granularity: str | None = None

    reads = "model"

    def propose(self, measured: Mapping[str, Any], target: float, spread: float | None = None) -> dict[str, float]:
        return self.from_measured(measured, target, spread)


@contextmanager
def restored(walked: WalkedBlock) -> Iterator[None]:
    """The block's matrices as they were, on leaving: a copy of one block is held."""
    before = {weight: walked.tensor(weight).clone() for weight in walked.weights}
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in before.items():
                walked.tensor(weight).copy_(value)


def masked_for_the_next(walk: Iterator[WalkedBlock], change: Callable[[WalkedBlock], None]) -> None:
    """Have `change` write to every block in its turn, so that those after it see it so; then it is what it was."""
    walked = next(walk, None)
    while walked is not None:
        with restored(walked):
            change(walked)
            walked = next(walk, None)
