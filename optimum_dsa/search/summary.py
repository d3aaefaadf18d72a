"""Scores of a matrix as a histogram: what any allocation function can be computed from without the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pruning.allocation import PRE_PROCESS, REDUCTION, AllocationFunction
from ..pruning.allocation.histogram import BINS, score_bins, score_histogram


SAMPLE = 1 << 16


@dataclass(frozen=True)
class ScoreSummary:
    """How many scores lie where, and their sum there: 65,536 bins whose edges are 0.4 % apart.

    The bins are the leading bits of a float32, so that they need no range beforehand. A function of the scores is
    taken at each bin's mean: means are exact, smooth functions off by the variance inside a bin, about 10⁻⁶.

    Attributes:
        values: means of the bins that hold anything, rising, float64.
        weights: how many scores each holds, float64.
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, scores: Tensor) -> ScoreSummary:
        """The summary of non-negative float32 scores of any shape."""
        flat = scores.flatten()
        bins, weights = score_bins(flat), score_histogram(flat).double()
        sums = torch.zeros(BINS, dtype=torch.float64, device=flat.device).scatter_add_(0, bins.long(), flat.double())
        return cls._compact(sums.cpu(), weights.cpu())

    @classmethod
    def merged(cls, summaries: Sequence[ScoreSummary]) -> ScoreSummary:
        """The summary of the scores of all."""
        if len(summaries) == 1:
            return summaries[0]
        weights, sums = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
        for summary in summaries:
            # A mean lies in its own bin, so that the bins of all fit together.
            bins = score_bins(summary.values.float()).long()
            weights.scatter_add_(0, bins, summary.weights)
            sums.scatter_add_(0, bins, summary.values * summary.weights)
        return cls._compact(sums, weights)

    @classmethod
    def _compact(cls, sums: Tensor, weights: Tensor) -> ScoreSummary:
        """Of sums and numbers of scores per bin, (65536,) float64 each, those that hold anything."""
        used = weights > 0
        return cls(sums[used] / weights[used], weights[used])

    def pre_processed(self, names: Sequence[str]) -> Tensor:
        """The values after these pre-process operations, (bins,) float32 as scores; whole-set ones are weighted."""
        x = self.values.float()
        for name in names:
            x = (
                _WEIGHTED_PRE[name](x.double(), self.weights).float()
                if name in _WEIGHTED_PRE
                else PRE_PROCESS[name](x)
            )
        return x

    def reduce(self, name: str, x: Tensor) -> float:
        """Reduction `name` of pre-processed values `x`, (bins,).

        A reduction that a user registered is applied to 65,536 values drawn at equal shares.
        """
        if name in _WEIGHTED:
            return float(_WEIGHTED[name](x.double(), self.weights))
        # Quantiles at equal shares stand for all scores: any function of a vector can be applied to them.
        share = (torch.arange(SAMPLE, dtype=torch.float64) + 0.5) / SAMPLE * self.weights.sum()
        return float(REDUCTION[name](x[torch.searchsorted(self.weights.cumsum(0), share)]))


def measure(function: AllocationFunction, summary: ScoreSummary) -> float:
    """`function.measure` of the unit that `summary` summarises."""
    return summary.reduce(function.reduction, summary.pre_processed(function.pre_process))


def _mean(x: Tensor, w: Tensor) -> Tensor:
    """Mean of values x, (bins,), of which there are w each, (bins,): a scalar, as of the scores themselves."""
    return (x * w).sum() / w.sum()


def _var(x: Tensor, w: Tensor) -> Tensor:
    """Unbiased variance of x with numbers w, (bins,) each: a scalar."""
    return ((x - _mean(x, w)).square() * w).sum() / (w.sum() - 1)


def _normalize(x: Tensor, w: Tensor) -> Tensor:
    """`normalize` of x with numbers w, (bins,) each -> (bins,)."""
    return ((x - _mean(x, w)) / _var(x, w).sqrt()).nan_to_num(nan=0.0)


def _mms(x: Tensor, w: Tensor) -> Tensor:
    """`mms` of x, (bins,) -> (bins,): extremes need no numbers."""
    return (x - x.min()) / (x.max() - x.min() + 1e-9)


def _entropy(x: Tensor, w: Tensor) -> Tensor:
    """`entropy` of x with numbers w, (bins,) each: a scalar."""
    share = x.clamp_min(0)
    total = (share * w).sum()
    share = share / total
    return torch.where(total > 0, -(torch.xlogy(share, share) * w).sum(), 0.0)


def _quantile_half(x: Tensor, w: Tensor) -> Tensor:
    """`median`, the lower of the middle two, of x with numbers w, (bins,) each: a scalar."""
    order = x.argsort()
    return x[order][torch.searchsorted(w[order].cumsum(0), (w.sum() + 1).div(2).floor())]


def _outliers(x: Tensor, w: Tensor) -> Tensor:
    """`outlier_share` of x with numbers w, (bins,) each: a scalar."""
    return 100 * _mean((x > 5 * _mean(x, w)).double(), w)


def _geometric(x: Tensor, w: Tensor) -> Tensor:
    """`geometric_mean` of x with numbers w, (bins,) each: a scalar."""
    return _mean(x.abs().clamp_min(torch.finfo(torch.float32).tiny).log(), w).exp()


# Each of them has its twin, by name, in the tables of operations; tests hold both against each other.
_WEIGHTED_PRE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"normalize": _normalize, "mms": _mms}
_WEIGHTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "no_op": _mean,
    "var": _var,
    "std": lambda x, w: _var(x, w).sqrt(),
    "l1_norm": lambda x, w: _mean(x.abs(), w),
    "frobenius_norm": lambda x, w: (x.square() * w).sum().sqrt(),
    "geometric_mean": _geometric,
    "entropy": _entropy,
    "median": _quantile_half,
    "outlier_share": _outliers,
}
