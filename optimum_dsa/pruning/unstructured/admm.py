"""ALPS: which weights to keep, found by the alternating direction method of multipliers, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...model.statistics import LayerStatistics
from .choice import Choice
from .floors import keep_beside
from .refit import refit, refitted


STEPS = 300
PENALTY = 0.1  # the first
EVERY = 3  # steps between two penalties
# Share of the kept weights that changed since the last penalty -> the factor of the next, as in the published code.
FACTORS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# The support has settled, after so many steps, where no larger share of it changes: what still does is near ties.
SETTLED = (30, 3e-4)
REFIT = 10  # steps of conjugate gradients: it begins where ADMM has all but arrived
# Inputs up to which X·Xᵀ is decomposed once for all penalties and all matrices that share it. That takes 5 to 20 times
# as long as a product of two such matrices, the more the smaller they are; a factor for every penalty takes 1 to 3.
LARGEST = 1024

# Matrix, (rows, columns) -> itself times ρ (H + ρ)⁻¹; made for one penalty ρ.
Drawn = Callable[[Tensor], Tensor]


@torch.no_grad()
def admm(weight: Tensor, statistics: LayerStatistics, choice: Choice) -> Tensor:
    """The weights, of the number and pattern asked for, that bring the outputs of a matrix nearest to what they were.

    min ‖(W − Ŵ) X‖² over Ŵ of that support. Its relaxation splits Ŵ in two, one for the error and one for the support,
    and draws them together with a penalty that grows while the support changes; `refit` finds the weights on it.
    With `choice.keep` the support is given, and only they are sought. Columns are scaled to a unit diagonal of X Xᵀ.

    Costs an eigendecomposition of X·Xᵀ for each different input, once, or with more than `LARGEST` inputs a Cholesky
    factor every three steps; and then one or two products (out_features, in_features) · (in_features, in_features) a
    step, 30 to 100 steps as a rule. Memory beyond the statistics: four matrices of the weight's size, three of X·Xᵀ's.

    Returns (out_features, in_features) in the weight's dtype. Weights of inputs that never fired go first: they
    multiply nothing, whatever their size; and so do those that are zero.

    Meng et al., 2024, "ALPS", https://arxiv.org/abs/2406.07831, algorithm 1, with damping that draws to W.
    """
    if choice.keep is not None:
        return refit(weight, statistics, choice)
    # Weights that were zero before go first as well: pruning that goes on brings none of them back.
    first = (weight == 0) | statistics.dead

    def project(sought: Tensor) -> Tensor:
        """Mask of the largest, (out_features, in_features), as many as may stay."""
        return keep_beside(choice.pattern, sought.square().masked_fill_(first, 0), choice.count, choice.gone)

    # Of inputs that nobody saw none is correlated with another: the largest weights are the answer, for no cost.
    if statistics.tokens == 0:
        return weight.masked_fill(~project(weight.float()), 0)
    way = _by_spectrum if statistics.in_features <= LARGEST else _by_factor
    scale, drawing = way(statistics, choice.damping, len(weight))
    scaled = weight.float() * scale
    if project(scaled).all():
        return weight.clone()
    keep, start = _support(scaled, drawing, project)
    # What it holds is as large as X·Xᵀ, and the refit needs as much.
    del drawing
    return refitted(weight, statistics, keep, choice.damping, start.div_(scale), REFIT)


def _support(
    scaled: Tensor, drawing: Callable[[float], Drawn], project: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The mask that is kept, and nearly the weights on it, both (out_features, in_features).

    One matrix holds the state: where it is kept it is the sparse solution D, elsewhere the scaled multiplier V / ρ, as
    D = keep · (W̃ + V / ρ) and V / ρ becomes what the projection has cut off. The step for the error,
    W̃ = (W H − V + ρ D) (H + ρ)⁻¹, is then W + ρ (D − V / ρ − W) (H + ρ)⁻¹.

    Args:
        scaled: (out_features, in_features), W in columns of unit second moment.
        drawing: penalty -> what draws with it.
        project: the mask of the largest.
    """
    keep = before = project(scaled)
    state = scaled.masked_fill(~keep, 0)
    penalty, kept, grown = PENALTY, max(int(keep.sum()), 1), False
    drawn = drawing(penalty)
    for step in range(1, STEPS + 1):
        with _short_factors():
            sought = drawn(torch.where(keep, state, -state).sub_(scaled)).add_(scaled)
        state = sought.add_(state.masked_fill_(keep, 0))
        keep = project(state)
        if step % EVERY:
            continue
        changed, before = int((keep != before).sum()) / kept, keep
        if (not changed and grown) or (step >= SETTLED[0] and changed < SETTLED[1]):
            break
        # A support that never moved is held by the penalty: a smaller one lets it go.
        factor = next((factor for share, factor in FACTORS if changed > share), 0.2)
        grown |= changed > 0
        penalty *= factor
        # The multiplier V stays what it was, and not V / ρ.
        state = torch.where(keep, state, state / factor)
        drawn = None  # goes first: either is as large as X·Xᵀ
        drawn = drawing(penalty)
    return keep, state.masked_fill_(~keep, 0)


@contextmanager
def _short_factors() -> Iterator[None]:
    """Products on a GPU by its matrix units (TF32, factors of 11 bits): the step moves a support, `refit` is exact.

    Pruned so, llama-10m's perplexity at 70 % was 46.08, and 46.14 without (factors rounded on the CPU, 64 windows).
    """
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _by_spectrum(statistics: LayerStatistics, damping: float, rows: int) -> tuple[Tensor, Callable[[float], Drawn]]:
    """The scale of the columns, (in_features,), and penalty -> what draws (rows, in_features) with it."""
    spectrum = statistics.spectrum(damping)
    values, vectors = spectrum.values, spectrum.vectors

    def drawing(penalty: float) -> Drawn:
        shares = penalty / (values + penalty)
        # One product with the inverse instead of two with the eigenvectors, where there are rows enough to pay for it.
        if EVERY * rows >= len(vectors):
            inverse = (vectors * shares) @ vectors.t()
            return lambda matrix: matrix @ inverse
        return lambda matrix: (matrix @ vectors).mul_(shares) @ vectors.t()

    return spectrum.scale, drawing


def _by_factor(statistics: LayerStatistics, damping: float, rows: int) -> tuple[Tensor, Callable[[float], Drawn]]:
    """As `_by_spectrum`, with a Cholesky factor for every penalty and no eigendecomposition."""
    hessian, scale = statistics.scaled_moment(damping)

    def drawing(penalty: float) -> Drawn:
        factor = hessian.clone()
        factor.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(factor)
        if failed:  # X·Xᵀ without damping, and a penalty near none: an eigenvalue below zero is told from one at zero
            return _by_spectrum(statistics, damping, rows)[1](penalty)
        # A solution takes longer than a product with the inverse, and few rows do not make up for finding that; but on
        # a GPU, which has to take its columns in turn.
        if EVERY * rows < len(factor) and not factor.is_cuda:
            return lambda matrix: torch.cholesky_solve(matrix.t(), factor).t().mul_(penalty)
        inverse = torch.cholesky_inverse(factor).mul_(penalty)
        return lambda matrix: matrix @ inverse

    return scale, drawing
