"""What a pruned matrix is fitted to: its own outputs on the inputs that it gets, or the dense model's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.statistics import DAMPING, LayerStatistics


# "sparse": W·X, the matrix's own outputs on what the pruned blocks before it give. "dense": W·X_dense, what the dense
# model has there, so that a matrix makes up for what was lost before it.
TARGETS = ("sparse", "dense")


@torch.no_grad()
def dense_target(weight: Tensor, statistics: LayerStatistics, damping: float = DAMPING) -> Tensor:
    """The matrix T whose outputs on the inputs X come closest to W·X_dense; an update prunes it in the place of W.

    T minimises ‖T·X − W·X_dense‖² + λ‖T − W‖², which is T = W (X_dense·Xᵀ + λ)(X·Xᵀ + λ)⁻¹, computed as
    W + W (X_dense − X) Xᵀ (X·Xᵀ + λ)⁻¹: where the inputs are those of the dense model it is W, bit for bit. What
    ‖T'·X − W·X_dense‖² of any T' has beyond that of T at λ = 0 is ‖(T' − T)·X‖², the objective of every update, so
    none of them has to know of X_dense. Where the statistics have `lack`, of W·X_dense + (H_dense − H), H being the
    residual stream to which the outputs are added: T makes up for what the stream lacks, too.

    Args:
        weight: W, (out_features, in_features).
        statistics: of X, with `gram` and, where all inputs have a dense counterpart, `drift`, (in_features,
            in_features) both. Without it (a routed expert) the target is W.
        damping: λ as a share of the mean of diag(X·Xᵀ).

    Returns:
        (out_features, in_features), float32, or `weight` itself.

    The objective is SparseGPT's, https://arxiv.org/abs/2301.00774, eq. 1, with the dense model's inputs on its left.
    """
    # In the first block nothing has drifted, and its matrices need no factor for this.
    parts = [weight.float() @ statistics.drift] if statistics.is_paired and statistics.drift.any() else []
    parts += [statistics.lack] if statistics.lacks and statistics.lack.any() else []
    if not parts:
        return weight
    factor = statistics.inverse_factor(damping).factor  # U, the inverse being Uᵀ·U
    return weight.float() + sum(parts) @ factor.t() @ factor
