"""What an allocator sees of the model: one unit, a block or a single matrix, at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.statistics import LayerStatistics


@dataclass(frozen=True)
class Unit:
    """The weights that share one sparsity.

    Attributes:
        name (`str`): of the block or matrix.
        depth (`float`): the block's position in its stack, 0 for the first of 1, up to 1 for the last.
        weights (`Sequence[Tensor]`): (out_features, in_features) each, the model's own: read, never written.
        statistics (`Sequence[LayerStatistics | None]`): of each weight's input; `None` where nothing was calibrated.
        metric (`Callable[[Tensor, LayerStatistics | None], Tensor]`): (weight, statistics) -> scores.
    """

    name: str
    depth: float
    weights: Sequence[Tensor]
    statistics: Sequence[LayerStatistics | None]
    metric: Callable[[Tensor, LayerStatistics | None], Tensor]

    def scores(self) -> list[Tensor]:
        """Fresh scores of every weight, (out_features, in_features) float32 each."""
        return [self.metric(weight, statistics) for weight, statistics in zip(self.weights, self.statistics)]

    def flat_scores(self) -> Tensor:
        """The scores of all weights in one vector, (weights,) float32; never held twice."""
        # Filled part by part: `torch.cat` would hold all scores twice, gigabytes of a large block.
        flat = torch.empty(sum(w.numel() for w in self.weights), dtype=torch.float32, device=self.weights[0].device)
        for part, weight, statistics in zip(self.split(flat), self.weights, self.statistics):
            part.copy_(self.metric(weight, statistics))
        return flat

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a vector as `flat_scores` makes it, one of each weight's shape."""
        parts = flat.split([weight.numel() for weight in self.weights])
        return [part.view(weight.shape) for part, weight in zip(parts, self.weights)]
