"""A strategy that reads how the error of every matrix rises with its sparsity, and how much the loss minds it."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import STRATEGIES, UNIFORM, Problem, Search, pass_windows
from .space import Candidate
from .trace import Request


# Sparsity from where a matrix stands, either way, at which it is solved as well: about as far as a step goes, and wide
# enough for two slopes of its error curve to differ.
OFFSETS = (0.05,)
GRID = (-OFFSETS[0], 0.0, OFFSETS[0])
RATES = (4.0, 16.0)  # bounds of a curve's exponent: outside of them it is noise, or a matrix at its end
PASS = 16_384  # validation tokens behind the slopes of a step


# An anchor a step costs a prune; in return the loss there is that of the pruned model, and no proxy.
@STRATEGIES.register(named=False, curves=OFFSETS, reference="https://arxiv.org/abs/2410.14649")
def curves(problem: Problem, tokens: int = PASS, reach: float = 0.1, damping: float = 0.4) -> Search:
    """The allocation that loses least by the error curves of all matrices, each weighted by the loss's slope. Ours.

    The error of a matrix rises exponentially in its sparsity: from the slope of the loss where it stands, and the rate
    of its error curve, follows what one more weight costs anywhere near. Weights are moved until it costs the same in
    all matrices, by `damping` of the way and `reach` at most; there the model is pruned anew. The steps shrink as the
    budget runs out, and there are three at least, on fewer than `tokens` validation tokens each if need be.
    """
    resolver = problem.resolver
    counts = resolver.counts(problem.start or UNIFORM)
    sizes = torch.tensor(list(resolver.sizes.values()), dtype=torch.float64)
    began, start = problem.budget.share, 0
    usual = max(tokens // problem.length, 1)
    if (room := problem.budget.room(problem.until).tokens) is not None:
        usual = min(usual, max(room // (9 * problem.length), 1))
    path: list[Candidate] = []
    while not problem.over and (windows := pass_windows(problem, usual)):
        left = 1 - (problem.budget.share - began) / max(problem.until - began, 1e-9)
        path.append(Candidate("curves", counts=counts))
        yield [Request("anchor", path[-1])]
        start = start if start + windows <= problem.windows else 0
        (trial,) = yield [Request("slopes", path[-1], start, start + windows)]
        start += windows
        if trial.loss is None or trial.slopes is None:
            break
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
    # Later ones have seen more text. Their losses are of different windows, and tell less: the prune decides.
    ends = [Candidate("curves", counts=counts), *reversed(path), problem.start or UNIFORM]
    return list(dict.fromkeys(ends))


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
