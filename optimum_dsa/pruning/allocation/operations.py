"""The four operation tables of an allocation function.

    scores of a unit ─► pre-process ─► reduction ─► (one number per unit) ─► transform ─► post-process

Operations are pure: out of place, on the device of their input. A value outside the domain of an operation becomes NaN
or an infinity as in the published code; `AllocationFunction` turns those into the published constants.

DSA (Li et al., NeurIPS 2024); the table of the published code, https://github.com/lliai/DSA, except where said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...common.registry import Registry


DSA = "https://github.com/lliai/DSA"
OWL = "https://arxiv.org/abs/2310.05175"

PRE_PROCESS = Registry("pre-process operation")
# A reduction with the fact `matrix` takes the list of a unit's 2-D score matrices instead of one vector.
REDUCTION = Registry("reduction")
TRANSFORM = Registry("transform")
POST_PROCESS = Registry("post-process operation")


# -- pre-process: scores of one unit, any shape -> the same shape


@PRE_PROCESS.register(reference=DSA)
def no_op(x: Tensor) -> Tensor:
    """x itself, of any shape."""
    return x


@PRE_PROCESS.register(reference=DSA)
def log(x: Tensor) -> Tensor:
    """ln(x + 10⁻⁶), where x ≤ 0 counts as 1; of any shape."""
    # In place on the copy that `where` makes: a block of a large model has 10⁹ scores.
    return torch.where(x <= 0, 1.0, x).add_(1e-6).log_()


@PRE_PROCESS.register(reference=DSA)
def abslog(x: Tensor) -> Tensor:
    """ln|x|, where x = 0 counts as 1; of any shape."""
    return torch.where(x == 0, 1.0, x).abs_().log_()


@PRE_PROCESS.register("pow", reference=DSA)
def square(x: Tensor) -> Tensor:
    """x², of any shape."""
    return x.square()


@PRE_PROCESS.register(reference=DSA)
def normalize(x: Tensor) -> Tensor:
    """(x − mean) / standard deviation over all of x, of any shape; zero where the deviation is zero."""
    return (x - x.mean()).div_(x.std()).nan_to_num_(nan=0.0)


@PRE_PROCESS.register(reference=DSA)
def mms(x: Tensor) -> Tensor:
    """Min-max scaling over all of x, of any shape: (x − min) / (max − min + 10⁻⁹)."""
    low, high = x.aminmax()
    return (x - low).div_(high - low + 1e-9)


for _name in ("abs", "exp", "sigmoid", "tanh"):
    PRE_PROCESS.add(_name, getattr(torch, _name), reference=DSA)


# -- reduction: scores of one unit, 1-D -> a number


@REDUCTION.register(reference=DSA)
def mean(x: Tensor) -> Tensor:
    """Mean, (n,) -> float64 scalar."""
    # A float32 sum over 10⁸ scores loses digits.
    return x.mean(dtype=torch.float64)


# The published code carries an unreduced tensor on through the transforms and takes the mean at the very end; a
# function of the mean is what is left of it once heavy and light half are separate.
REDUCTION.add("no_op", mean, reference=DSA)


@REDUCTION.register(reference=DSA)
def var(x: Tensor) -> Tensor:
    """Unbiased variance, (n,) -> float64 scalar."""
    return x.var().double()


@REDUCTION.register(reference=DSA)
def std(x: Tensor) -> Tensor:
    """Unbiased standard deviation, (n,) -> float64 scalar."""
    return x.std().double()


@REDUCTION.register(reference=DSA)
def l1_norm(x: Tensor) -> Tensor:
    """Mean of |x|, (n,) -> float64 scalar."""
    return x.abs().mean(dtype=torch.float64)


@REDUCTION.register(reference=DSA)
def frobenius_norm(x: Tensor) -> Tensor:
    """√Σ x², (n,) -> float64 scalar."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)


@REDUCTION.register(reference=DSA)
def geometric_mean(x: Tensor) -> Tensor:
    """(Π |x_i|)^(1/n), summed as logarithms, (n,) -> float64 scalar. Zeros count as 10⁻³⁸."""
    # The published code multiplies first, which under- or overflows from some hundred scores on.
    return x.abs().clamp_min_(torch.finfo(x.dtype).tiny).log_().mean(dtype=torch.float64).exp()


@REDUCTION.register(reference=DSA)
def entropy(x: Tensor) -> Tensor:
    """−Σ p ln p in nats of p = x⁺ / Σ x⁺, the positive part, (n,) -> float64 scalar; 0 where nothing is positive."""
    positive = x.clamp_min(0)
    total = positive.sum(dtype=torch.float64)
    share = positive.div_(total)
    return torch.where(total > 0, -torch.xlogy(share, share).sum(dtype=torch.float64), 0.0)


@REDUCTION.register(reference=OWL)
def outlier_share(x: Tensor) -> Tensor:
    """Percentage of scores above 5 times their mean, (n,) -> float64 scalar.

    Yin et al., 2024, OWL, https://arxiv.org/abs/2310.05175, eq. 1, M = 5. Not in DSA's space.
    """
    return 100 * (x > 5 * x.mean()).mean(dtype=torch.float64)


@REDUCTION.register(reference="https://arxiv.org/abs/2505.23807")
def median(x: Tensor) -> Tensor:
    """Median, the lower of the middle two, (n,) -> float64 scalar. Not in DSA's space: DLP's, as in its paper."""
    return x.median().double()


def matrix_reduction(operation: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """`operation`, (rows, columns) -> number, registered as the mean over a unit's matrices, weighted by their sizes.

    The published code flattens the scores first, so that each of these raises there.
    """
    return _of_matrices(operation, operation)


def spectral_reduction(operation: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], Tensor]:
    """`operation`, singular values (n,) -> number, as a matrix reduction; its fact `spectrum` is `operation`."""
    return _of_matrices(operation, lambda x: operation(singular_values(x)), spectrum=operation)


def _of_matrices(named: Callable, operation: Callable[[Tensor], Tensor], **facts) -> Callable:
    """A registered reduction of a list of (rows, columns): the mean of `operation`, weighted by size."""

    def reduction(matrices: Sequence[Tensor]) -> Tensor:
        return mean_by_size([operation(m) for m in matrices], matrices)

    reduction.__name__, reduction.__doc__ = named.__name__, named.__doc__
    return REDUCTION.add(named.__name__, reduction, reference=DSA, matrix=True, **facts)


def mean_by_size(values: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
    """The mean of one scalar per matrix, (rows, columns) each, weighted by their sizes: float64 scalar."""
    sizes = torch.tensor([m.numel() for m in matrices], dtype=torch.float64)
    return (torch.stack([value.double().cpu() for value in values]) * sizes).sum() / sizes.sum()


@matrix_reduction
def gram(x: Tensor) -> Tensor:
    """Mean entry of X Xᵀ, which is ‖Σ_i x_i‖² / rows², of X (rows, columns)."""
    return x.sum(dim=0, dtype=torch.float64).square().sum() / x.shape[0] ** 2


@matrix_reduction
def corref(x: Tensor) -> Tensor:
    """Mean correlation coefficient of two rows of x, (rows, columns); a constant row correlates with none."""
    centred = x.double() - x.mean(dim=1, keepdim=True, dtype=torch.float64)
    norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return torch.where(norm > 0, centred / norm, 0.0).sum(dim=0).square().sum() / x.shape[0] ** 2


@matrix_reduction
def diagonal(x: Tensor) -> Tensor:
    """Mean of the main diagonal of x, (rows, columns)."""
    return x.diagonal().mean(dtype=torch.float64)


def singular_values(x: Tensor) -> Tensor:
    """Singular values of x, (rows, columns), through the eigenvalues of its smaller Gram matrix, float64."""
    # eigvalsh raises on NaN and infinities, and one bad function must not end a search.
    if not x.isfinite().all():
        return torch.full((1,), math.nan, dtype=torch.float64)
    # Squaring halves the digits: in float32 half of a spectrum would be rounding.
    x = (x if x.shape[0] <= x.shape[1] else x.t()).double()
    return torch.linalg.eigvalsh(x @ x.t()).clamp_min_(0).sqrt_()


@spectral_reduction
def rank(singular: Tensor) -> Tensor:
    """Numerical rank: how many singular values, (n,), are above 10⁻³ of the largest."""
    return (singular > 1e-3 * singular.max()).sum()


@spectral_reduction
def slogdet(singular: Tensor) -> Tensor:
    """Mean logarithm of singular values, (n,), ln det(X Xᵀ) / 2n, those under 10⁻⁶ of the largest counting as that."""
    return _mean_logarithm(singular)


@spectral_reduction
def determinant(singular: Tensor) -> Tensor:
    """Geometric mean of the singular values, det(X Xᵀ)^(1/2n): a determinant per dimension, whatever the shape."""
    return _mean_logarithm(singular).exp()


def _mean_logarithm(singular: Tensor) -> Tensor:
    """Mean ln of singular values, (n,) -> scalar, those under 10⁻⁶ of the largest counting as that."""
    floor = (1e-6 * singular.max()).clamp_min(torch.finfo(torch.float64).tiny)
    return singular.clamp_min(floor).log().mean()


# -- transform: (units,) -> (units,), each on its own


for _name in ("sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "abs", "sigmoid", "tanh"):
    TRANSFORM.add(_name, getattr(torch, _name), reference=DSA)
TRANSFORM.add("no_op", no_op, reference=DSA)
TRANSFORM.add("softplus", torch.nn.functional.softplus, reference=DSA)


# -- post-process: (units,) -> (units,), may look at all of them


for _name in ("no_op", "exp", "log", "sigmoid", "tanh", "abs", "sin", "cos"):
    POST_PROCESS.add(_name, TRANSFORM[_name], reference=DSA)


@POST_PROCESS.register(reference=DSA)
def softmax(x: Tensor) -> Tensor:
    """exp(x) / Σ exp(x) over the units, (units,) float64."""
    return x.softmax(dim=0)


@POST_PROCESS.register("normalize", reference=DSA)
def standardize(x: Tensor) -> Tensor:
    """(x − mean) / standard deviation over the units, (units,), clipped to ±2; zero when they are all equal."""
    return ((x - x.mean()) / x.std()).nan_to_num(nan=0.0).clamp(-2, 2) if len(x) > 1 else torch.zeros_like(x)


@POST_PROCESS.register("rank")
def ordinal(x: Tensor) -> Tensor:
    """How many units are below each, (units,): only the order is left (equal values share the lower number). Ours."""
    return (x[:, None] > x[None, :]).sum(dim=1).to(x.dtype)
