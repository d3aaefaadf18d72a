"""How much of what a matrix gives is lost as more and more of the structures that it reads go."""

from __future__ import annotations

import torch
from torch import Tensor

from ..importance import Parts


@torch.no_grad()
def error_curve(parts: Parts, order: Tensor, update: str) -> Tensor:
    """What is lost when the first of `order` go, for every number of them: (structures + 1,) float64, ascending.

    It is Σ ‖(W − Ŵ)·X‖² over the matrices W that read structures. With the update "refit" Ŵ is the best one without
    these columns, damped as there: with H = R·Rᵀ, R upper triangular, in the order in which columns go, the first k
    cost Σ_{j ≤ k} ‖(Rᵀ·Wᵀ)_j‖², so that one factorisation gives the whole curve. Without a refit it is W_G·H_GG·W_Gᵀ,
    and with the update "bias" H is that of X less its mean.

    Args:
        parts: of a unit, with `gram` (with `mean`, too, for "bias").
        order: (structures,) int64, what goes first.

    Raises:
        ValueError: X·Xᵀ cannot be factorised at this damping.
    """
    chosen = parts.columns[order].flatten()
    moment = parts.statistics.second_moment
    rest = torch.ones(len(moment), dtype=torch.bool, device=moment.device).index_fill_(0, chosen, False)
    places = torch.cat([chosen, rest.nonzero().flatten()])
    # (columns, out_features) of each matrix, in that order
    readers = [part[order].flatten(0, 1).float() for part in parts.reads]
    if update == "refit":
        lost = _refitted(moment[places[:, None], places], readers, parts.damping)
    else:
        hessian = moment[chosen[:, None], chosen]
        if update == "bias":
            mean = parts.statistics.mean[chosen]
            hessian = hessian - parts.statistics.tokens * mean[:, None] * mean
        products = hessian * sum(reader @ reader.t() for reader in readers)
        # What the k-th column adds: its own product, and twice those with the columns before it.
        lost = 2 * products.tril(-1).sum(1) + products.diagonal()
    lost = lost.double().reshape(len(order), -1).sum(1).cumsum(0)
    return torch.cat([lost.new_zeros(1), lost]).cummax(0).values.cpu()


def _refitted(hessian: Tensor, readers: list[Tensor], damping: float) -> Tensor:
    """What each of the first columns adds to the error, (columns,), `hessian` being X·Xᵀ in their order."""
    diagonal = hessian.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1.0).add_(damping * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise ValueError(
            f"X·Xᵀ, {tuple(hessian.shape)}, has no Cholesky factor at damping {damping:g}; give a larger damping, or "
            "more calibration text."
        )
    upper = lower.flip(0, 1)
    lost = 0
    for reader in readers:
        columns = len(reader)
        # What no structure owns comes last, and stays.
        lost = lost + (upper[:columns, :columns].t() @ reader).square().sum(1)
    return lost
