"""A strategy that reads how the error of every matrix rises with its sparsity, and how much the loss minds it."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import STRATEGIES, UNIFORM, Problem, Search
from .space import Candidate
from .trace import Request


GRID = (-0.1, -0.04, 0.0, 0.04, 0.1)  # sparsities, from where it stands, at which error curves are read
RATES = (4.0, 16.0)  # bounds of a curve's exponent: outside of them it is noise, or a matrix at its end


# An anchor a pass costs a prune; in return the loss at every step is that of the pruned model, and no proxy.
@STRATEGIES.register(named=False, curves=True, reference="https://arxiv.org/abs/2410.14649")
def curves(problem: Problem, windows: int = 32, reach: float = 0.1, damping: float = 0.4) -> Search:
    """The allocation that loses least by the error curves of all matrices, each weighted by the loss's slope. Ours.

    The error of a matrix rises exponentially in its sparsity: from the slope of the loss where it stands, and the rate
    of its error curve, follows what one more weight costs anywhere near. Weights are moved until it costs the same in
    all matrices, by `damping` of the way and `reach` at most; there the model is pruned anew. The steps shrink as the
    budget runs out.
    """
    resolver = problem.resolver
    counts = resolver.counts(problem.start or UNIFORM)
    sizes = torch.tensor(list(resolver.sizes.values()), dtype=torch.float64)
    began, start = problem.budget.share, 0
    windows = min(windows, problem.windows)
    if (room := problem.budget.room(problem.until).tokens) is not None:
        windows = min(windows, max(room // (9 * problem.length), 1))  # three passes at least
    path: list[tuple[float, tuple[int, ...]]] = []
    while not problem.over:
        left = 1 - (problem.budget.share - began) / max(problem.until - began, 1e-9)
        yield [Request("anchor", Candidate("curves", counts=counts))]
        start = start if start + windows <= problem.windows else 0
        (trial,) = yield [Request("slopes", Candidate("curves", counts=counts), start, start + windows)]
        start += windows
        if trial.slopes is None:
            break
        path.append((trial.loss, counts))
        grid = _grid(torch.tensor(counts, dtype=torch.float64), sizes)
        asked = [Request("errors", Candidate("curves", counts=tuple(level))) for level in grid.long().tolist()]
        errors = [answer.slopes for answer in (yield asked)]
        if None in errors:
            break
        rates = rates_of(grid / sizes, torch.tensor(errors, dtype=torch.float64))
        slopes = torch.tensor(trial.slopes, dtype=torch.float64)
        step = damping * (0.1 + 0.9 * left)
        moved = balanced(torch.tensor(counts) / sizes, slopes, rates / step, sizes, reach)
        counts = resolver.fit(dict(zip(resolver.sizes, moved.tolist())))
    best = [Candidate("curves", counts=tried) for _, tried in sorted(path, key=lambda step: step[0])]
    last = Candidate("curves", counts=counts)
    # The last is where it was going, and has met no window yet.
    return list(dict.fromkeys([*best[:1], last, *best[1:], problem.start or UNIFORM]))


def _grid(counts: Tensor, sizes: Tensor) -> Tensor:
    """Whole counts at `GRID` around `counts`, of matrices of these sizes, (matrices,) both: (levels, matrices)."""
    offsets = torch.tensor(GRID, dtype=torch.float64)[:, None]
    return (counts + offsets * sizes).round().clamp_min(0).minimum(sizes)


def rates_of(shares: Tensor, errors: Tensor) -> Tensor:
    """The exponents k of error curves whose slope is ∝ exp(k · sparsity), (matrices,).

    `shares` are the sparsities at which the curves have `errors`, (levels, matrices) both, ascending.
    """
    tiny = torch.finfo(torch.float64).tiny
    slopes = ((errors.diff(dim=0)) / shares.diff(dim=0).clamp_min(1e-9)).clamp_min(tiny).log()
    middles = (shares[1:] + shares[:-1]) / 2
    x, y = middles - middles.mean(0), slopes - slopes.mean(0)
    return ((x * y).sum(0) / x.square().sum(0).clamp_min(tiny)).clamp(*RATES)


def balanced(shares: Tensor, slopes: Tensor, rates: Tensor, sizes: Tensor, reach: float) -> Tensor:
    """The sparsities, within `reach` of `shares`, at which one more weight costs the same everywhere, (matrices,).

    At sparsity s it costs slope · exp(rate · (s − share)); the number of all weights that go stays.

    Args:
        shares, slopes, rates, sizes: (matrices,): where they stand, what one more weight costs there, how fast that
            rises with the sparsity, weights.
    """
    middle = slopes.median().clamp_min(torch.finfo(torch.float64).tiny)
    # Slopes span orders of magnitude, and noise makes some of them negative, which have no logarithm.
    costs = (slopes / middle).clamp(0.1, 10).log()
    low, high = -20.0, 20.0

    def at(cost: float) -> Tensor:
        return shares + ((cost - costs) / rates).clamp(-reach, reach)

    for _ in range(60):
        cost = (low + high) / 2
        if ((at(cost) - shares) * sizes).sum() > 0:
            high = cost
        else:
            low = cost
    return at(low)
