"""What is derived of X·Xᵀ: the factor of its inverse, and its spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InverseFactor:
    """Upper Cholesky factor U of (X Xᵀ + damping)⁻¹ = Uᵀ U, (in_features, in_features), and the damping it took."""

    factor: Tensor
    damping: float


@dataclass(frozen=True)
class Spectrum:
    """Eigenvectors and eigenvalues of H = S⁻¹ (X Xᵀ + damping) S⁻¹, S = diag(scale) giving H a unit diagonal.

    Attributes:
        scale (`Tensor`): (in_features,), positive: the square root of the damped diagonal.
        values (`Tensor`): (in_features,), ascending, none below zero.
        vectors (`Tensor`): (in_features, in_features), one eigenvector a column.
    """

    scale: Tensor
    values: Tensor
    vectors: Tensor


def damped(moment: Tensor, damping: float) -> Tensor:
    """X·Xᵀ, (n, n), a one where an input never fired, and `damping` times its mean on the diagonal: (n, n)."""
    # A copy: the gram is needed again at another damping, and by allocators.
    hessian = moment.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return hessian


def factor_of_inverse(matrix: Tensor) -> Tensor | None:
    """Upper Cholesky factor U of matrix⁻¹ = Uᵀ·U, (n, n) -> (n, n); `None` where that fails.

    U is R⁻¹, R being the upper triangular matrix with R·Rᵀ = matrix, which the Cholesky factor of the matrix from its
    other end is. At most two matrices are alive beside the gram, and the inverse itself is none of them.
    """
    factor = matrix.flip(0, 1)
    del matrix
    factor, failed = torch.linalg.cholesky_ex(factor)
    if failed:
        return None
    factor = factor.flip(0, 1)
    # Solved where it stands: by columns is how LAPACK has a matrix, and no copy is needed.
    inverse = torch.eye(len(factor), device=factor.device).t()
    torch.linalg.solve_triangular(factor, inverse, upper=True, out=inverse)
    # A nearly singular matrix can pass without a failure, and leave infinities behind.
    return inverse if torch.stack(inverse.t().aminmax()).isfinite().all() else None
