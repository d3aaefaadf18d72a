"""Importance of structures: what goes with each, one number; the least important go first.

Every row takes the [`Parts`] of all structures of a kind in a block, and returns (structures,) float32, non-negative,
on their device. None of them changes its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.registry import Registry
from ...model.statistics import DAMPING, LayerStatistics


# The fact `reads` says what a row needs of calibration: "nothing", "inputs", "mean" or "gram", see `reads_of`.
IMPORTANCES = Registry("importance")


@dataclass(frozen=True)
class Parts:
    """What the structures of one kind in one block own.

    Attributes:
        makes (`Sequence[Tensor]`): by matrix, the rows that make each: (structures, rows, in_features).
        reads (`Sequence[Tensor]`): by matrix, the columns that read it: (structures, columns, out_features).
        columns (`Tensor`): (structures, columns) int64, where these are in the input of the matrices that read.
        statistics (`LayerStatistics`, *optional*): of that input; `None` where nothing is read.
    """

    makes: Sequence[Tensor]
    reads: Sequence[Tensor]
    columns: Tensor
    statistics: LayerStatistics | None = None
    damping: float = DAMPING


@IMPORTANCES.register(reference="https://arxiv.org/abs/2305.11627", reads="nothing")
def magnitude(parts: Parts) -> Tensor:
    """Σ w² over all that a structure owns, (structures,).

    The "l2" importance of Ma et al., 2023, "LLM-Pruner", https://arxiv.org/abs/2305.11627.
    """
    return sum(part.float().square().sum(dim=(1, 2)) for part in (*parts.makes, *parts.reads))


@IMPORTANCES.register(reference="https://arxiv.org/abs/1608.08710", reads="nothing")
def magnitude_l1(parts: Parts) -> Tensor:
    """Σ |w| over all that a structure owns, (structures,).

    Li et al., 2016, "Pruning Filters for Efficient ConvNets", https://arxiv.org/abs/1608.08710.
    """
    return sum(part.float().abs().sum(dim=(1, 2)) for part in (*parts.makes, *parts.reads))


@IMPORTANCES.register(reference="https://arxiv.org/abs/2312.11983", reads="inputs")
def wanda_sp(parts: Parts) -> Tensor:
    """Σ |W_ij| · ‖x_j‖ over the columns that read a structure, (structures,).

    Wanda's score, summed over what goes together: An et al., 2023, https://arxiv.org/abs/2312.11983.
    """
    norms = parts.statistics.input_norm[parts.columns]
    return sum((part.float().abs().sum(dim=2) * norms).sum(dim=1) for part in parts.reads)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2312.11983", reads="mean")
def flap(parts: Parts) -> Tensor:
    """Σ var(x_j) · ‖W_j‖² over the columns that read a structure, (structures,): what its mean cannot stand in for.

    var is over all tokens. An et al., 2023, "FLAP", https://arxiv.org/abs/2312.11983.
    """
    found = parts.statistics
    mean = found.mean
    variance = (found.squared_sum / max(found.tokens, 1) - mean.square()).clamp_min_(0)[parts.columns]
    return sum((part.float().square().sum(dim=2) * variance).sum(dim=1) for part in parts.reads)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2302.04089", reads="gram")
def obs(parts: Parts) -> Tensor:
    """The error of the best refit without a structure, (structures,): tr(W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ).

    S are its columns, and H is X·Xᵀ, damped. Each is taken to go alone.

    Kurtic et al., 2023, "ZipLM", https://arxiv.org/abs/2302.04089.
    """
    factor = parts.statistics.inverse_factor(parts.damping).factor  # U, H⁻¹ being Uᵀ·U
    own = factor[:, parts.columns].permute(1, 0, 2)  # (structures, in_features, columns)
    inner = own.transpose(1, 2) @ own
    return sum((part.float() * torch.linalg.solve(inner, part.float())).sum(dim=(1, 2)) for part in parts.reads)
