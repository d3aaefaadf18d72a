"""Element-wise importance: (weight, statistics) -> scores of the weight's shape; the lowest are pruned first.

Every metric takes `weight`, (out_features, in_features) of any floating dtype, and the `LayerStatistics` of its input,
and returns float32 scores, non-negative, on the weight's device. None of them changes its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .symbolic import MetricTable


if TYPE_CHECKING:
    from ...model.statistics import LayerStatistics

# The fact `reads` says what a metric needs of calibration: "nothing", "inputs" (the default), "gram" (X·Xᵀ),
# "gradients" (of the model's loss) or "regional" (gradients of what the weight's own block gives).
# A text such as "mul(abs(W), X)" is a metric as well, without a row: see `symbolic`.
METRICS = MetricTable("metric")


@METRICS.register(reference="https://arxiv.org/abs/1506.02626", reads="nothing")
def magnitude(weight: Tensor, statistics: LayerStatistics | None = None) -> Tensor:
    """The weight's absolute value, |W_ij|; (out_features, in_features) float32.

    Han et al., 2015, https://arxiv.org/abs/1506.02626.
    """
    return weight.float().abs()


@METRICS.register(reference="https://arxiv.org/abs/2306.11695")
def wanda(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Weight magnitude times the norm of the input it multiplies, |W_ij| · ‖x_j‖.

    `statistics.input_norm`, (in_features,): √(Σ x² over tokens ÷ number of sequences).

    Sun et al., 2023, https://arxiv.org/abs/2306.11695, eq. 1.
    """
    # In place on the copy that abs makes: a large matrix is never held a third time.
    return weight.float().abs().mul_(statistics.input_norm)


@METRICS.register(reference="https://arxiv.org/abs/2306.11695")
def wanda_variant(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Share of its row's total Wanda score that lies at or below each weight, (out_features, in_features).

    One threshold α on this share over the whole matrix removes from every row the weights that together hold less than
    α of the row's score: rows with a few strong weights lose more. The published code finds α by bisection; counted
    over the matrix (pattern "matrix") it is met exactly.

    Sun et al., 2023, https://arxiv.org/abs/2306.11695, `use_variant` in the published code.
    """
    # Stable, so that equal scores keep the order of their position, as everywhere in patterns.
    ordered, order = wanda(weight, statistics).sort(dim=1, stable=True)
    # A row of zeros has shares of 0, and not 0 / 0.
    shares = ordered.cumsum(dim=1).div_(ordered.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny))
    return torch.empty_like(shares).scatter_(1, order, shares)


@METRICS.register(reference="https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning")
def ria(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Importance relative to row and column, (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖x_j‖^½.

    Shapes as everywhere here: (out_features, in_features) and `statistics.input_norm`, (in_features,).

    Zhang et al., "Plug-and-Play", ICLR 2024, Relative Importance and Activations with a = ½,
    https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning.
    """
    size = weight.float().abs()
    # Rows and columns without a weight, which pruned models have: 0 / tiny is 0.
    tiny = torch.finfo(torch.float32).tiny
    relative = size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative.mul_(statistics.input_norm.sqrt())


@METRICS.register(reference="https://arxiv.org/abs/2301.00774", reads="gram")
def obs(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Optimal Brain Surgeon's error of removing one weight, W_ij² / [(X Xᵀ + damping)⁻¹]_jj.

    Needs `statistics.gram`, (in_features, in_features). The update "sparsegpt" evaluates it along its own
    elimination order instead.

    Hassibi & Stork, 1993; Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774, eq. 3.
    """
    # The inverse is Uᵀ U, whose diagonal is the sum of squares of each column of U.
    inverse_diagonal = statistics.inverse_factor().factor.square().sum(dim=0)
    return weight.float().square() / inverse_diagonal


@METRICS.register(reference="https://arxiv.org/abs/2311.04902", reads="gradients")
def gblm(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """Wanda's score blended with the gradient's, |W_ij| · (‖x_j‖ + α ‖G_ij‖₂), α = 100.

    `statistics.gradient`, (out_features, in_features): the ℓ₂ norm over samples of the gradients of the dense model's
    loss. The sum over samples is not divided by their number, as published: more of them give gradients more weight.

    Das et al., 2023, Beyond Size: How Gradients Shape Pruning Decisions, https://arxiv.org/abs/2311.04902, eq. 3, with
    the second of its two norms.
    """
    return (100 * statistics.gradient).add_(statistics.input_norm).mul_(weight.float().abs())


@METRICS.register(reference="https://arxiv.org/abs/2406.02924", reads="gradients")
def pruner_zero(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """|W_ij · W_ij| · minmax(|G_ij|), minmax bringing the gradients of a matrix to [0, 1].

    `statistics.gradient`, (out_features, in_features), as in `gblm`. Where all are equal, as those of an expert that
    no token was routed to, W_ij² alone decides.

    Dong et al., ICML 2024, Pruner-Zero, https://arxiv.org/abs/2406.02924: the symbolic metric that was found there.
    """
    gradient = statistics.gradient
    low, high = gradient.aminmax()
    scores = weight.float().square()
    return scores.mul_(gradient - low).div_(high - low) if high > low else scores


def wanda_with_regional_gradients(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """|W_ij| · (‖x_j‖ + α G_ij), α = 100, G being the gradients of what the weight's own block gives.

    `statistics.regional_gradient`, (out_features, in_features), brought to the root of the mean over samples of the
    squared gradients of ‖f(X)‖₂. They are those of the block as it stands behind the pruned blocks before it.

    Yang et al., 2025, Wanda++, https://arxiv.org/abs/2503.04992, the regional gradient score. What follows there, the
    training of every block, is `reconstruct` here.
    """
    gradient = statistics.regional_gradient / max(statistics.sequences, 1) ** 0.5
    return gradient.mul_(100).add_(statistics.input_norm).mul_(weight.float().abs())


METRICS.add("wanda++", wanda_with_regional_gradients, reference="https://arxiv.org/abs/2503.04992", reads="regional")


@METRICS.register(reference="https://arxiv.org/abs/2601.09176", reads="gram")
def d2(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """`obs` with a first-order term for inputs that differ from those of calibration, + λ · ‖y_i‖ · |W_ij| · ‖x_j‖.

    Y is W·X, a bias left out. The scale of the term is the published code's, whose running sums over n samples come to
    λ = n (n + 1) √(2n) ÷ (6 s²) beside X·Xᵀ, norms being of one sample and s = 1500; its second-order term has weight
    0 there.

    Xiong et al., 2026, D²Prune, https://arxiv.org/abs/2601.09176, the dual Taylor expansion, with an update.
    """
    samples = max(statistics.sequences, 1)
    scale = samples * (samples + 1) * (2 * samples) ** 0.5 / (6 * _D2_SCALE**2)
    return obs(weight, statistics).add_(_first_order(weight, statistics), alpha=scale)


@METRICS.register(reference="https://arxiv.org/abs/2601.09176", reads="gram")
def d2_still(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """W_ij² · ‖x_j‖² + λ · ‖y_i‖ · |W_ij| · ‖x_j‖: `d2` of matrices whose other weights stay as they are.

    λ is ((n + 1) ÷ 2 s)², for the reason given there.
    """
    scale = ((max(statistics.sequences, 1) + 1) / (2 * _D2_SCALE)) ** 2
    error = weight.float().square().mul_(statistics.input_norm.square())
    return error.add_(_first_order(weight, statistics), alpha=scale)


_D2_SCALE = 1500  # what the published scripts divide norms by


def _first_order(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """‖y_i‖ · |W_ij| · ‖x_j‖, (out_features, in_features): norms are roots of the mean over samples of squares."""
    weight = weight.float()
    squares = (weight @ statistics.second_moment * weight).sum(1, keepdim=True).clamp_min_(0)
    outputs = (squares / max(statistics.sequences, 1)).sqrt_()
    return weight.abs().mul_(statistics.input_norm).mul_(outputs)
