"""Allocations under an update: every matrix solved at a few levels, from which a candidate is put together."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture, Weight
from ...model.statistics import LayerStatistics
from ...packed.bitmask import pack, unpack
from ...pruning.allocate import fit
from ...pruning.calibration import Calibration
from ...pruning.configuration import DSAConfig
from ...pruning.targets import dense_target
from ...pruning.unstructured.objective import layer_error
from ..counts import counts_of
from .masks import Masks, shown
from .realisation import REALISATIONS


# Sparsities, from that of the anchor either way, at which every matrix is solved: dense where a search ends, and wide
# enough for what named allocators ask for. Beyond the last, rows are dense or empty: a guess, and a harmless one, as
# the anchor moves there before anything else is asked.
OFFSETS = (0.04, 0.1, 0.2)


@dataclass(frozen=True)
class Level:
    """A matrix without `count` of its weights.

    Attributes:
        count: of weights that are gone.
        kept: (out_features,) int64, weights left in each row.
        error: the share of the matrix's output that is lost.
        packed: the matrix in bfloat16, a bit per weight and the kept ones, on the CPU; dense where that is smaller;
            `None` for the matrix as it was, or nothing of it.
    """

    count: int
    kept: Tensor
    error: float
    packed: Tensor | None = None


class Database(Masks):
    """The `Realisation` of methods that change the weights that they keep: masks *and* weights as `prune` makes them.

    At the anchor, the model pruned to some counts exactly as `prune` does it, every matrix is solved at its count and
    at `offsets` around it, from the same statistics: the targets, the order and the residual of the method, and one
    decomposition for all. A candidate takes each matrix from the levels about its count, the rows of one and of the
    other in such parts that the number of weights is met: rows do not touch each other in a layer's error, so that it
    lies between both as the count does. What the neighbours of a matrix would become if it changed is not in it: that
    is what an anchor is moved for. It begins at uniform.

    Memory: 7 levels of (1 − sparsity) · 2 bytes + a bit per weight on the CPU, 5 bytes per weight at 70 %.

    Frantar & Alistarh, 2022, SPDQ, https://arxiv.org/abs/2208.11580; Sieberling et al., 2024, EvoPress,
    https://arxiv.org/abs/2410.14649.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        calibration: Calibration | None,
        config: DSAConfig,
        offsets: Sequence[float] = OFFSETS,
    ):
        super().__init__(model, architecture, calibration, config)
        self.offsets = tuple(offsets)
        units = architecture.units("block")
        self._uniform = counts_of(fit(dict.fromkeys(units, config.sparsity), architecture, config, "block"), units)
        self._levels: dict[str, list[Level]] = {}

    def move_anchor(self, counts: Mapping[str, int] | None) -> None:
        """Solve around `counts` from now on, in the model that is pruned to them; `None`: around uniform."""
        if counts != self.anchor:
            super().move_anchor(counts)

    @contextmanager
    def at(self, counts: Mapping[str, int]) -> Iterator[None]:
        """The model with every matrix put together from its levels about `counts`."""
        self._ensure_anchor()
        self._assemble(counts)
        with self.masked.active():
            yield

    @contextmanager
    def slopes(self, counts: Mapping[str, int]) -> Iterator[dict[str, float]]:
        """As `at`; yields per matrix how fast the loss rises with one more weight removed: g · dW between levels."""
        self._ensure_anchor()
        self._assemble(counts)
        slopes = dict.fromkeys(self.sizes, 0.0)

        def receive(weight: Weight, gradient: Tensor) -> None:
            """Add the slope of one weight, from its gradient, (out_features, in_features)."""
            levels, count = self._levels[weight.name], counts[weight.name]
            known = [level.count for level in levels]
            # At a level itself, from the one before it to the one behind it.
            fewer = levels[max(bisect_left(known, count) - 1, 0)]
            more = levels[min(bisect_right(known, count), len(levels) - 1)]
            change = self._matrix(weight.name, more).float() - self._matrix(weight.name, fewer).float()
            slope = (gradient.float() * change.to(gradient.device)).sum().item()
            slopes[weight.name] += slope / (more.count - fewer.count)

        with self._backward(receive):
            yield slopes

    def errors(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Matrix -> the share of its output, ‖(T − Ŵ)X‖² ÷ ‖T X‖², that is lost at `counts`, T being its target."""
        self._ensure_anchor()
        found = {}
        for name, levels in self._levels.items():
            below, above, share = _between(levels, counts[name])
            found[name] = below.error + share * (above.error - below.error)
        return found

    @torch.no_grad()
    def _ensure_anchor(self, band: float = 0.0) -> None:
        """Have every matrix at its levels about the anchor, whose blocks are pruned one after the other for it."""
        if self._anchored:
            return
        self._forget()
        counts = self.anchor or self._uniform
        with self.masked.active():
            for walked in self._walk(self.config.sequential, sys.maxsize, shown("Solving at levels"), True):
                self.masked.solved = {}  # blocks before this one have run for the last time
                for group in walked.groups(self.config.update.true_sequential):
                    for weight in group.weights:
                        tensor, statistics = walked.tensor(weight), group.statistics.get(weight.name)
                        self._solve(weight.name, tensor, statistics, counts[weight.name])
        self._anchored = True

    def _solve(self, name: str, tensor: Tensor, statistics: LayerStatistics | None, count: int) -> None:
        """Fill the levels of a matrix, (out_features, in_features), about `count`, and have its block use that one."""
        rows, columns = tensor.shape
        levels = [Level(0, torch.full((rows,), columns), 0.0)]
        for level in self._grid(name, count):
            new = self.method.of_weight(name).pruned(tensor, statistics, level)
            if level == count:
                # As it is, so that what follows sees what `prune` makes; the levels are rounded to bfloat16.
                self.masked.solved[name] = partial(torch.clone, new)
            kept, small = (new != 0).sum(1).cpu(), new.to(torch.bfloat16).cpu()
            packed = pack(small)
            error = relative_error(tensor, new, statistics, self.method.damping, "cross_gram" in self.method.reads)
            levels.append(Level(level, kept, error, small if packed is None else packed))
        if levels[-1].count < tensor.numel():
            levels.append(Level(tensor.numel(), torch.zeros(rows, dtype=torch.int64), 1.0))
        self._levels[name] = levels

    def _grid(self, name: str, count: int) -> list[int]:
        """The counts at which a matrix is solved: within the bounds, in steps that the pattern can follow."""
        size, step = self.sizes[name], self.steps[name]
        low, high = self.config.min_sparsity * size, self.config.max_sparsity * size
        around = (count + way * offset * size for offset in self.offsets for way in (-1, 1))
        grid = {round(wished / step) * step for wished in around if low <= wished <= high}
        return sorted({level for level in (*grid, count) if 0 < level <= size})

    def _assemble(self, counts: Mapping[str, int]) -> None:
        self.masked.solved = {name: partial(self._between, name, counts[name]) for name in self._levels}

    def _between(self, name: str, count: int) -> Tensor:
        """The matrix without `count` weights: rows of the level above it, and of the one below."""
        below, above, share = _between(self._levels[name], count)
        if share in (0, 1):
            return self._matrix(name, above if share else below)
        order = _order(len(below.kept))
        gone = (below.kept - above.kept)[order].cumsum(0)
        taken = order[: int((gone - (count - below.count)).abs().argmin()) + 1]
        matrix = self._matrix(name, below)
        return matrix.index_copy(0, taken, self._matrix(name, above)[taken])

    def _matrix(self, name: str, level: Level) -> Tensor:
        """A matrix at one of its levels, (out_features, in_features) bfloat16 on the CPU."""
        if level.packed is None:
            weight = self.masked.value(name).detach().to("cpu", torch.bfloat16)
            return weight if level.count == 0 else torch.zeros_like(weight)
        return unpack(level.packed) if level.packed.dtype == torch.uint8 else level.packed

    def _forget(self) -> None:
        super()._forget()
        self._levels = {}


REALISATIONS.add("database", Database, proxy="matrices solved at levels about uniform")


def _between(levels: list[Level], count: int) -> tuple[Level, Level, float]:
    """The levels about `count`, which may be one and the same, and where it lies between them, in [0, 1]."""
    place = bisect_left([level.count for level in levels], count)
    above = levels[min(place, len(levels) - 1)]
    below = above if above.count == count or not place else levels[place - 1]
    width = above.count - below.count
    return below, above, (count - below.count) / width if width else 0.0


@cache
def _order(rows: int) -> Tensor:
    """In which order rows change from one level to the next, (rows,) int64: mixed, and always the same."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def relative_error(
    weight: Tensor, new: Tensor, statistics: LayerStatistics | None, damping: float, dense: bool = False
) -> float:
    """‖(T − Ŵ)X‖² ÷ ‖T X‖² of a matrix and what it became, (out_features, in_features) both.

    T is the weight, or with `dense` the target that the dense model gives. Where X·Xᵀ was not collected, inputs count
    as uncorrelated; without statistics, as white.
    """
    if statistics is None or statistics.gram is None:
        scale = 1.0 if statistics is None else statistics.input_norm
        lost, whole = ((part.float() * scale).square().sum().item() for part in (weight.float() - new.float(), weight))
        return lost / whole if whole else 0.0
    target = dense_target(weight, statistics, damping) if dense else weight
    return layer_error(target.float(), new.float(), statistics.second_moment)
