"""What makes up for structures that go: least squares of the matrices that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.statistics import DAMPING, LayerStatistics


@torch.no_grad()
def refit_columns(weight: Tensor, statistics: LayerStatistics, gone: Tensor, damping: float = DAMPING) -> Tensor:
    """A matrix without some columns that gives what is nearest to what it gave: (out_features, in_features) float32.

    min over Ŵ, zero in the columns `gone`, of ‖(W − Ŵ)·X‖² + λ‖W − Ŵ‖², λ being `damping` times the mean of
    diag(X·Xᵀ). With K the columns that stay and H = X·Xᵀ + λ it is Ŵ_K = W_K + W_G·H_GK·H_KK⁻¹, exact, one
    factorisation for all rows.

    Args:
        weight: W, (out_features, in_features).
        statistics: of X, with `gram`.
        gone: (in_features,) bool.

    Kurtic et al., 2023, "ZipLM", https://arxiv.org/abs/2302.04089, for all columns at once.
    """
    new = weight.float().masked_fill(gone, 0)
    if gone.all() or not gone.any():
        return new
    moment = statistics.second_moment
    hessian = moment[~gone][:, ~gone]
    diagonal = hessian.diagonal()
    # An input that never fired is made up for by none, and makes up for none.
    diagonal.masked_fill_(diagonal == 0, 1.0).add_(damping * moment.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise ValueError(
            f"X·Xᵀ of the columns that stay, {tuple(hessian.shape)}, has no Cholesky factor at damping {damping:g}; "
            "give a larger damping, or more calibration text."
        )
    right = (weight[:, gone].float() @ moment[gone][:, ~gone]).t()
    new[:, ~gone] += torch.cholesky_solve(right, factor).t()
    return new
