"""Named allocators: the published ones as rows of one table.

An allocator has two halves: `measure(unit)` sees the weights and is called once per unit; `propose(measured, target,
spread)` maps all measurements to a sparsity per unit, in microseconds. `fit_to_budget` comes after, always.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...common.registry import Registry
from . import besa, from_model
from .function import AllocationFunction
from .histogram import BINS, score_histogram
from .operations import singular_values
from .unit import Unit
from .whole import FromModel


class Allocator(Protocol):
    """What `ALLOCATIONS` holds; an `AllocationFunction` is one.

    Attributes:
        reads: what `measure` needs of calibration: "nothing" (it may read the weights), "scores" (whatever the metric
            needs) or "gram"; or "model": then it is a [`FromModel`], which has `measure_model` in its place.
        granularity: "block" or "matrix" where the allocator exists at that granularity only, otherwise `None`.
    """

    reads: str
    granularity: str | None

    def measure(self, unit: Unit) -> Any: ...

    def propose(self, measured: Mapping[str, Any], target: float, spread: float | None = None) -> dict[str, float]: ...


@dataclass(frozen=True)
class Heuristic:
    """An `Allocator` made of two functions."""

    measure: Callable[[Unit], Any]
    from_measured: Callable[[Mapping[str, Any], float, float | None], dict[str, float]]
    reads: str = "scores"
    granularity: str | None = None

    def propose(self, measured: Mapping[str, Any], target: float, spread: float | None = None) -> dict[str, float]:
        return self.from_measured(measured, target, spread)


ALLOCATIONS = Registry("allocation")

OWL = "https://arxiv.org/abs/2310.05175"
DLP = "https://arxiv.org/abs/2505.23807"

ALLOCATIONS.add(
    "dsa", AllocationFunction(("abslog",), "var", ("atan", "asin")), reference="https://github.com/lliai/DSA"
)
ALLOCATIONS.add("owl", AllocationFunction(reduction="outlier_share", sign=-1), reference=OWL)


# -- DLP: a function whose spread depends on the target

# Half-widths that the public DLP code uses at each sparsity.
_DLP_SPREAD = {0.1: 0.06, 0.2: 0.02, 0.3: 0.04, 0.4: 0.02, 0.5: 0.04, 0.6: 0.10, 0.7: 0.15, 0.8: 0.12}


def published_spread(target: float) -> float:
    """DLP's published half-width at this sparsity, linear between its points and constant beyond them."""
    points = sorted(_DLP_SPREAD)
    right = bisect.bisect_left(points, target)
    if right in (0, len(points)):
        return _DLP_SPREAD[points[0 if right == 0 else -1]]
    low, high = points[right - 1], points[right]
    share = (target - low) / (high - low)
    return (1 - share) * _DLP_SPREAD[low] + share * _DLP_SPREAD[high]


def _with_published_spread(function: AllocationFunction) -> Heuristic:
    def propose(measured, target, spread):
        return function.propose(measured, target, published_spread(target) if spread is None else spread)

    return Heuristic(function.measure, propose)


ALLOCATIONS.add("dlp", _with_published_spread(AllocationFunction(reduction="mean")), reference=DLP)
ALLOCATIONS.add("dlp_median", _with_published_spread(AllocationFunction(reduction="median")), reference=DLP)


# -- allocators that read no scores


def _uniform(measured, target, spread):
    return dict.fromkeys(measured, target)


ALLOCATIONS.add("uniform", Heuristic(lambda unit: None, _uniform, reads="nothing"))


def _ramp(measured: Mapping[str, float], target: float, spread: float | None) -> dict[str, float]:
    """Sparsity rising linearly with depth, S − spread in the first block to S + spread in the last."""
    half_width = 0.08 if spread is None else spread
    return {unit: target + half_width * (2 * depth - 1) for unit, depth in measured.items()}


ALLOCATIONS.add(
    "atp",
    Heuristic(lambda unit: unit.depth, _ramp, reads="nothing"),
    reference="https://arxiv.org/abs/2502.14770",
)


def _shape(unit: Unit) -> tuple[int, int]:
    return tuple(unit.weights[0].shape)


def _erdos_renyi(measured: Mapping[str, tuple[int, int]], target: float, dense: set[str]) -> dict[str, float]:
    """Density ε (n_out + n_in) / (n_out · n_in); what would exceed 1 is dense, and ε is solved again."""
    sizes = {unit: rows * columns for unit, (rows, columns) in measured.items()}
    raw = {unit: sum(shape) / sizes[unit] for unit, shape in measured.items()}
    kept = (1 - target) * sum(sizes.values())
    while True:
        free = [unit for unit in measured if unit not in dense]
        left = kept - sum(sizes[unit] for unit in dense)
        # Not 0 / 0 where every unit is dense already.
        epsilon = max(left, 0) / max(sum(raw[unit] * sizes[unit] for unit in free), 1e-12)
        full = {unit for unit in free if epsilon * raw[unit] > 1}
        if not full:
            return {unit: 0.0 if unit in dense else 1 - epsilon * raw[unit] for unit in measured}
        dense = dense | full


def _er(measured, target, spread):
    return _erdos_renyi(measured, target, set())


def _er_plus(measured, target, spread):
    """ER with the last matrix dense at the same total, as far as the budget goes."""
    return _erdos_renyi(measured, target, {list(measured)[-1]})


ALLOCATIONS.add(
    "er",
    Heuristic(_shape, _er, reads="nothing", granularity="matrix"),
    reference="https://arxiv.org/abs/1707.04780",
)
ALLOCATIONS.add(
    "er_plus",
    Heuristic(_shape, _er_plus, reads="nothing", granularity="matrix"),
    reference="https://arxiv.org/abs/2202.02643",
)


# -- global: one threshold over all scores


def _score_histogram(unit: Unit) -> Tensor:
    """How many of the unit's scores are in each bin of `score_histogram`, (65536,) int64."""
    return sum(score_histogram(scores).cpu() for scores in unit.scores())


def _one_threshold(measured: Mapping[str, Tensor], target: float, spread: float | None) -> dict[str, float]:
    """Share of each unit's scores below the threshold that `target` of all lie below; counts are (65536,) int64."""
    total = sum(measured.values())
    goal = target * int(total.sum())
    edge = int((total.cumsum(0) <= goal).sum())
    # Scores are taken to be spread evenly in the bin of the threshold, so that the shares meet the target.
    within = (goal - int(total[:edge].sum())) / max(int(total[min(edge, BINS - 1)]), 1)
    return {
        unit: float(counts[:edge].sum() + within * counts[min(edge, BINS - 1)]) / int(counts.sum())
        for unit, counts in measured.items()
    }


ALLOCATIONS.add("global", Heuristic(_score_histogram, _one_threshold), reference="https://arxiv.org/abs/1506.02626")


# -- AlphaPruning: heavy tails of the spectrum


def _mean_tail_exponent(unit: Unit) -> tuple[float, int]:
    """Mean tail exponent of the unit's matrices, and how many weights they have."""
    # Eigenvalues of W Wᵀ are the squares of the singular values of W.
    exponents = [tail_exponent(singular_values(weight).square()) for weight in unit.weights]
    return sum(exponents) / len(exponents), sum(weight.numel() for weight in unit.weights)


def tail_exponent(eigenvalues: Tensor) -> float:
    """Hill estimate of the power-law exponent α of a spectrum, (n,): 1 + m / Σ ln(λ_i / λ_min) over the m largest.

    λ_min is the eigenvalue with the smallest Kolmogorov-Smirnov distance among those up to 1.5 times the peak of the
    spectrum's histogram (100 bins in log₁₀). The published code means a lower limit too, but compares a logarithm with
    a raw eigenvalue; it is kept as published, because its results rest on it. So is 0 where no eigenvalue is in these
    limits. Nothing is dropped but zeros, which have no logarithm.
    """
    eigenvalues = eigenvalues[eigenvalues > 0].double().cpu().sort().values
    if len(eigenvalues) < 3:
        return 1.0
    logs = eigenvalues.log10()
    counts = torch.histc(logs, bins=100)
    low, high = logs[0], logs[-1]
    peak = 10 ** (low + (high - low) * int(counts.argmax()) / 100)
    first = int((eigenvalues < torch.log10(0.95 * peak)).sum())
    last = int((eigenvalues <= 1.5 * peak).sum())
    best, exponent = 1.0, 0.0
    for index in range(first, min(last, len(eigenvalues) - 1)):
        tail = eigenvalues[index:]
        # A tail of equal eigenvalues has logarithms of zero.
        alpha = 1 + len(tail) / (tail / tail[0]).log().sum().clamp_min(1e-12)
        rank = torch.arange(len(tail), dtype=torch.float64) / len(tail)
        distance = (1 - (tail / tail[0]) ** (1 - alpha) - rank).abs().max()
        if distance < best:
            best, exponent = distance, float(alpha)
    return exponent


def _alpha(measured: Mapping[str, tuple[float, int]], target: float, spread: float | None) -> dict[str, float]:
    """Sparsity proportional to 1 − ε + 2ε · minmax(α), with the parameter-weighted mean `target`.

    ε is 0.3 as published, or spread / target.
    """
    # Relative to the target as published, so that a half-width in sparsity has to be divided by it.
    epsilon = 0.3 if spread is None else spread / max(target, 1e-9)
    alpha, sizes = torch.tensor(list(measured.values()), dtype=torch.float64).unbind(1)
    span = alpha.max() - alpha.min()
    # Matrices that are all alike give no reason to prefer one.
    share = (alpha - alpha.min()) / span if span > 0 else torch.full_like(alpha, 0.5)
    ratio = 1 - epsilon + 2 * epsilon * share
    return dict(zip(measured, (target * ratio * sizes.sum() / (ratio * sizes).sum()).tolist()))


ALLOCATIONS.add(
    "alphapruning",
    Heuristic(_mean_tail_exponent, _alpha, reads="nothing"),
    reference="https://arxiv.org/abs/2410.10912",
)


# -- LSA: reconstruction error of a greedy removal


def _removal_error(unit: Unit) -> float:
    return sum(greedy_error(weight, stats.second_moment) for weight, stats in zip(unit.weights, unit.statistics))


def greedy_error(weight: Tensor, gram: Tensor, width: int = 128) -> float:
    """Least output error of removing half of each row without an update, greedily within groups of `width` columns.

    `weight` (out_features, in_features), `gram` X Xᵀ. With E_i = W_i² H_ii, take the smallest again and again, adding
    2 W_i W_j H_ij to every E_j left, in this group and, once it is done, in all later ones.
    """
    total = 0.0
    weight = weight.float()
    errors = weight.square() * gram.diagonal()
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        w, error, h = weight[:, start:stop], errors[:, start:stop], gram[start:stop, start:stop]
        removed = torch.zeros_like(w)
        # Half of each group, whatever the target: the published measure of redundancy is taken there.
        for _ in range(w.shape[1] // 2):
            smallest, index = error.min(dim=1, keepdim=True)
            total += float(smallest.sum(dtype=torch.float64))
            error.addcmul_(w.gather(1, index) * w, h[index.squeeze(1)], value=2)
            error.scatter_(1, index, torch.inf)
            removed.scatter_(1, index, w.gather(1, index))
        errors[:, stop:].addcmul_(weight[:, stop:], removed @ gram[start:stop, stop:], value=2)
    return total


def _lsa(measured: Mapping[str, float], target: float, spread: float | None) -> dict[str, float]:
    """A higher error means more sparsity: LSA reads it as redundancy. Widths as in DLP."""
    half_width = published_spread(target) if spread is None else spread
    return AllocationFunction(spread=half_width).propose(measured, target)


ALLOCATIONS.add(
    "lsa",
    Heuristic(_removal_error, _lsa, reads="gram"),
    reference="https://github.com/BeiYazi0/LSA",
)


# -- N of 8, N differing from unit to unit: half-widths of one N

ALLOCATIONS.add("owl_nm", AllocationFunction(reduction="outlier_share", sign=-1, spread=1 / 8), reference=OWL)
ALLOCATIONS.add("dlp_nm", AllocationFunction(reduction="median", spread=1 / 8), reference=DLP)


# -- allocators that run the model

ALLOCATIONS.add(
    "ecoflap",
    FromModel(
        from_model.slopes_of_units, from_model.by_slopes, lambda blocks, windows: 2 * blocks * min(32 / windows, 1)
    ),
    reference=from_model.ECOFLAP,
)
ALLOCATIONS.add(
    "als",
    FromModel(from_model.gram_of_tokens, from_model.by_redundancy, lambda blocks, of: min(16 / of, 1)),
    reference=from_model.ALS,
)
ALLOCATIONS.add(
    "neuronal",
    FromModel(from_model.best_ramp, from_model.by_ramp, lambda blocks, of: 3 * 13 * min(16 / of, 1)),
    reference=from_model.NEURONAL,
)
ALLOCATIONS.add(
    "besa",
    # Forward and back, twice; the loss of two allocations; the dense block and the pruned one.
    FromModel(besa.learnt_sparsities, besa.by_learnt, lambda blocks, of: 3 * 2 + 2 + 3, granularity="matrix"),
    reference=besa.REFERENCE,
)


def measured_in_one_walk() -> list[str]:
    """Rows that a search and "auto" try by themselves: all but those that have to run the model again and again."""
    return [name for name, allocator in ALLOCATIONS.items() if allocator.reads != "model"]
