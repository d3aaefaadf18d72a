"""Kept weights as whole numbers of 8 or 4 bits and scales: which are chosen with the zeros known, and cost none.

A grid has a scale for every row, or for every `group` of its columns. Only kept weights decide it, and only they are
moved to it: zeros stay zeros, and what is kept stays other than zero, so that mask, pattern and sparsity are what they
were. Scales have the precision of bfloat16, which takes two bytes: numbers are chosen for the scale as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


BITS = (4, 8)  # of numbers, the fewest first
CHUNK = 2**20  # weights that are worked on at once: stays near a processor
# How far the largest weight may be cut off so that all others lie nearer to their numbers.
SHRINKS = [1 - step / 40 for step in range(21)]
GROUPS = (0, *(2**power for power in range(12, 4, -1)))  # columns that may share a scale, each a part of those before
_BITS = {2: torch.int16, 4: torch.int32}  # as integers, -0.0 is not 0.0
_PROBE = 4  # rows that tell nearly always that a matrix lies on no grid

# (weights, a group a row; what their errors count, of that shape or one row for all; the largest number) -> (rows,)
Scale = Callable[[Tensor, "Tensor | None", int], Tensor]


@dataclass(frozen=True)
class Grid:
    """A matrix on a grid: `numbers` times `scales`.

    Attributes:
        numbers (`Tensor`): (rows, columns) int8, from -7 to 7 with 4 bits, from -127 to 127 with 8; 0 where a zero is.
        scales (`Tensor`): (rows, groups) float32, positive.
        group (`int`): columns that share a scale; 0 for all of a row.
    """

    numbers: Tensor
    scales: Tensor
    group: int = 0

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the numbers stand for, (rows, columns): their products with the scales, rounded to `dtype`."""
        found = self.numbers.float()
        for place, columns in enumerate(groups_of(found.shape[1], self.group)):
            found[:, columns] *= self.scales[:, place, None]
        return found.to(dtype)


def largest(bits: int) -> int:
    """The largest number of `bits`; the smallest is its opposite, so that the grid is symmetric."""
    return 2 ** (bits - 1) - 1


def groups_of(columns: int, group: int) -> Iterator[slice]:
    """The columns of every group, of which the last may be narrower; with a `group` of 0 all are one."""
    for start in range(0, columns, group or max(columns, 1)):
        yield slice(start, min(start + group, columns) if group else columns)


def rounded(scale: Tensor) -> Tensor:
    """Scales, of any shape, as they are stored: positive float32 of bfloat16's precision."""
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16().float()


def absmax(weights: Tensor, importance: Tensor | None, most: int) -> Tensor:
    """The scale with which the largest of a group's weights, (rows, columns), is the largest number: (rows,)."""
    return rounded(weights.abs().amax(dim=1) / most)


def mse(weights: Tensor, importance: Tensor | None, most: int) -> Tensor:
    """The scale of the least squared error among a few that cut off the largest weights: (rows,).

    Args:
        weights: (rows, columns) float32, a group a row.
        importance: (rows or 1, columns), what an error of each weight counts; `None` where all count the same.
    """
    widest = weights.abs().amax(dim=1) / most
    best = lowest = None
    for shrink in SHRINKS:
        scale = rounded(widest * shrink)
        wrong = nearest(weights, scale, most).float().mul_(scale[:, None]).sub_(weights).square_()
        loss = (wrong if importance is None else wrong.mul_(importance)).sum(dim=1)
        if best is None:
            best, lowest = scale, loss
        else:
            better = loss < lowest
            best, lowest = torch.where(better, scale, best), torch.where(better, loss, lowest)
    return best


SCALES: dict[str, Scale] = {"absmax": absmax, "mse": mse}


def nearest(weights: Tensor, scale: Tensor, most: int, gone: Tensor | None = None) -> Tensor:
    """The numbers nearest to weights, (..., columns) float32, over `scale`, (...): int8.

    Args:
        gone: (..., columns), whose number is 0, and no other's is; `None` for the zeros.
    """
    over = weights / scale[..., None]
    numbers = over.abs().round_().clamp_(1, most).copysign_(over)
    return numbers.masked_fill_(weights == 0 if gone is None else gone, 0).to(torch.int8)


@torch.no_grad()
def to_grid(weight: Tensor, bits: int, group: int = 0, scales: str = "mse", importance: Tensor | None = None) -> Grid:
    """The nearest grid of `bits` to a weight, (rows, columns) of a floating type, each number by itself.

    Args:
        group: columns that share a scale; 0 for all of a row.
        scales: how they are chosen, a name in `SCALES`.
        importance: (columns,), what an error of each column's weights counts for "mse", such as Σ x².
    """
    counted = None if importance is None else _by_group(importance[None].float(), group)

    def scale(part: Tensor) -> Tensor:
        each = None if counted is None else counted.repeat(len(part) // len(counted), 1)
        return SCALES[scales](part.float(), each, largest(bits))

    return _made(weight, bits, group, scale)


@torch.no_grad()
def grid_of(weight: Tensor, bits: int) -> Grid | None:
    """The grid of `bits` on which a weight, (rows, columns), lies bit for bit; `None` where it lies on none.

    The largest weight of a group is one of few whole numbers times its scale, and each of them is tried: so nothing
    but the weights themselves has to be kept of a grid.
    """
    if weight.itemsize not in _BITS or not weight.numel():
        return None
    some = weight[(weight != 0).any(dim=1).nonzero()[:_PROBE, 0]]
    # What lies on the grid of a group lies on those of its parts, too: most matrices lie on none, which is known here.
    if _found(some, bits, GROUPS[-1]) is None:
        return None
    for group in GROUPS:
        near = group < weight.shape[1] and _found(some, bits, group) is not None
        if near and (grid := _found(weight, bits, group)) is not None:
            return grid
    return None


def grid_in(tensor: Tensor, bits: int) -> tuple[Grid, bool] | None:
    """The grid of `bits` on which the rows of a tensor, (..., rows, columns), lie, and whether they are its columns.

    The grid's rows are those of all matrices. `None` where it lies on none.
    """
    for exchanged in (False, True):
        turned = tensor.mT if exchanged else tensor
        if (grid := grid_of(turned.reshape(-1, turned.shape[-1]), bits)) is not None:
            return grid, exchanged
    return None


@torch.no_grad()
def to_scales(weight: Tensor, scales: Tensor, group: int, most: int, gone: Tensor) -> Grid:
    """The nearest grid with these scales, (rows, groups), to a weight, (rows, columns), 0 where `gone` is True."""
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for place, columns in enumerate(groups_of(weight.shape[1], group)):
        numbers[:, columns] = nearest(weight[:, columns].float(), scales[:, place], most, gone[:, columns])
    return Grid(numbers, scales, group)


def _found(weight: Tensor, bits: int, group: int) -> Grid | None:
    return _made(weight, bits, group, lambda part: _scales_of(part, largest(bits)))


def _made(weight: Tensor, bits: int, group: int, scale: Callable[[Tensor], Tensor | None]) -> Grid | None:
    """The grid of a weight, (rows, columns), with the scales that `scale` gives for groups, (n, width) -> (n,)."""
    rows, columns = weight.shape
    numbers = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, -(-columns // group) if group else 1, device=weight.device)
    step = max(CHUNK // max(columns, 1), 1)
    for first in range(0, rows, step):
        part = weight[first : first + step]
        groups = _by_group(part, group)
        if (found := scale(groups)) is None:
            return None
        scales[first : first + step] = found.view(len(part), -1)
        some = nearest(groups.float(), found, largest(bits))
        numbers[first : first + step] = some.view(len(part), -1)[:, :columns]
    return Grid(numbers, scales, group)


def _by_group(weight: Tensor, group: int) -> Tensor:
    """(rows, columns) -> (rows · groups, group), the last of a row filled with zeros, which no scale depends on."""
    if not group:
        return weight
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).reshape(-1, group)


def _scales_of(weights: Tensor, most: int) -> Tensor | None:
    """The scales with which numbers give the weights of a group, (rows, columns), again: (rows,)."""
    widest = weights.float().abs().amax(dim=1)
    if not widest.isfinite().all():
        return None
    kind = _BITS[weights.itemsize]
    scales, rest = rounded(widest), weights.view(kind).any(dim=1).nonzero().flatten()
    numbers, shifts = torch.arange(most, 0, -1, device=weights.device), torch.arange(-1, 2, device=weights.device)
    tried, size = 0, 1
    # The largest weight of nearly every group is the largest number: all others are tried at once for the few that are
    # left.
    while len(rest) and tried < most:
        part = weights[rest]
        middle = rounded(widest[rest, None] / numbers[tried : tried + size]).bfloat16().view(torch.int16)
        # The weight was rounded too, so that the scale may be a neighbour.
        scale = (middle[..., None] + shifts.to(torch.int16)).view(torch.bfloat16).float().flatten(1)
        again = nearest(part[:, None].float(), scale, most).float().mul_(scale[..., None]).to(weights.dtype)
        fits = (again.view(kind) == part.view(kind)[:, None]).all(dim=-1)
        first = (fits * torch.arange(fits.shape[1], 0, -1, device=fits.device)).argmax(dim=1)
        found = fits.any(dim=1)
        scales[rest[found]] = scale.gather(1, first[:, None])[found, 0]
        rest, tried = rest[~found], tried + size
        size = max(CHUNK // max(3 * len(rest) * weights.shape[1], 1), 1)
    return None if len(rest) else scales
