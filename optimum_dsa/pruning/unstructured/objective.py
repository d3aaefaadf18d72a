"""The objective that updates of one matrix share: how far its outputs move."""

from __future__ import annotations

import torch
from torch import Tensor


def row_errors(weight: Tensor, new: Tensor, gram: Tensor) -> Tensor:
    """‖(w − ŵ) X‖² of every output, (out_features,) float32.

    Args:
        weight: (out_features, in_features), before.
        new: (out_features, in_features), after.
        gram: (in_features, in_features), X·Xᵀ.
    """
    moved = new.float() - weight.float()
    # A sum of squares, which rounding can bring below zero.
    return torch.linalg.vecdot(moved @ gram, moved).clamp_min_(0)


def layer_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """‖(W − Ŵ) X‖² over ‖W X‖²: the share of a matrix's output that is lost; 0 where it has no output.

    `weight` and `new` are (out_features, in_features), `gram` is X·Xᵀ, (in_features, in_features).
    """
    output = row_errors(weight, torch.zeros_like(weight), gram).double().sum()
    lost = row_errors(weight, new, gram).double().sum()
    return (lost / output).item() if output > 0 else 0.0
