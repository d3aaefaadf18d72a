"""Least squares for the kept weights of a mask that is given."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.statistics import LayerStatistics
from .choice import Choice
from .objective import row_errors


# Steps of conjugate gradients. The preconditioned problem is well conditioned, and most of the gain is in the first.
STEPS = 30
# Share of its first size at which the residual of a row, squared, counts as gone: float32 goes little further.
TOLERANCE = 1e-9
# Curvature along a direction, of H with its unit diagonal, that cannot be told from none: there is no least to go to.
FLAT = 1e-6


@torch.no_grad()
def refit(weight: Tensor, statistics: LayerStatistics, choice: Choice) -> Tensor:
    """The kept weights that bring every output nearest to what it was: min over ŵ on the mask of ‖(w − ŵ) X‖².

    `choice.damping` times the mean of diag(X Xᵀ) is added to it, which draws ŵ to w, and not to zero. Solved for all
    rows at once by conjugate gradients, the mask held; a row whose error would rise, by rounding, keeps its weights.

    Costs one product (out_features, in_features) · (in_features, in_features) a step, and one such matrix of memory.

    Returns (out_features, in_features) in the weight's dtype, in which the errors were compared.
    """
    return refitted(weight, statistics, choice.keep, choice.damping, weight.masked_fill(~choice.keep, 0))


def refitted(
    weight: Tensor, statistics: LayerStatistics, keep: Tensor, damping: float, start: Tensor, steps: int = STEPS
) -> Tensor:
    """`refit` from `start`, (out_features, in_features), zero where `keep`, of the same shape, is False."""
    hessian, scale = statistics.scaled_moment(damping)
    before = weight.float()
    # What is sought is the change, so that rows which lose nothing stay as they are, bit for bit.
    change = _least_squares((start.float() - before).mul_(scale), hessian, keep, steps).div_(scale)
    del hessian
    new = change.add_(before).masked_fill_(~keep, 0).to(weight.dtype)
    start = start.to(weight.dtype)
    moment = statistics.second_moment
    fell = row_errors(weight, new, moment) <= row_errors(weight, start, moment)
    return torch.where(fell[:, None], new, start)


def _least_squares(change: Tensor, hessian: Tensor, free: Tensor, steps: int) -> Tensor:
    """`change`, (rows, columns), moved in place where it is `free` to the least of change · H · changeᵀ of every row.

    `hessian` is (columns, columns), of unit diagonal, so that no preconditioner is left to choose. The error falls
    with every step, whichever is the last.
    """
    residual = (change @ hessian).neg_().mul_(free)
    direction = residual.clone()
    size = torch.linalg.vecdot(residual, residual)[:, None]
    enough = size * TOLERANCE
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(steps):
        if not (size > enough).any():
            break
        slope = direction @ hessian
        curvature = torch.linalg.vecdot(direction, slope)[:, None]
        flat = curvature <= FLAT * torch.linalg.vecdot(direction, direction)[:, None]
        # Rows that have arrived have nothing left to divide, and are flat as well.
        length = (size / curvature).masked_fill_(flat, 0)
        change.addcmul_(direction, length)
        residual.sub_(slope.mul_(free).mul_(length))
        last, size = size, torch.linalg.vecdot(residual, residual)[:, None]
        direction.mul_(size / last.clamp_min(tiny)).add_(residual)
    return change
