"""Kept weights on a grid of whole numbers, what rounding loses made up for by those that are rounded later.

The grid itself, and the nearest one to a weight, are in `packed/grid.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.factor import damped
from ...model.statistics import DAMPING, LayerStatistics
from ...packed.grid import SCALES, Grid, grid_in, groups_of, largest, nearest, to_grid, to_scales


REFERENCE = "https://arxiv.org/abs/2210.17323"  # of feedback
SETTLING = "https://arxiv.org/abs/2406.17542"  # of what comes after it
SWEEPS = 3  # over all columns, once errors were fed back: each takes as long as that, and the first gains most
WIDTH = 128  # columns whose errors are given on to all later ones at once


def on_grid(
    weight: Tensor,
    statistics: LayerStatistics | None,
    bits: int,
    group: int = 0,
    scales: str = "mse",
    feedback: bool = True,
    damping: float = DAMPING,
) -> Tensor:
    """A weight, (rows, columns), whose kept entries lie on a grid of `bits`, in its dtype; its zeros are the same.

    Args:
        statistics: of its inputs, with `gram` for `feedback`; without, Σ x² says what an error of each column counts.
        group, scales: as of [`~packed.grid.to_grid`].
        feedback: whether columns make up for the errors of those before them.
    """
    if feedback:
        grid = settled(weight, fed_back(weight, statistics, bits, group, scales, damping), statistics, bits, damping)
    else:
        grid = to_grid(weight, bits, group, scales, None if statistics is None else statistics.input_norm.square())
    return grid.weights(weight.dtype)


@torch.no_grad()
def fed_back(
    weight: Tensor,
    statistics: LayerStatistics,
    bits: int,
    group: int = 0,
    scales: str = "mse",
    damping: float = DAMPING,
) -> Grid:
    """A grid of `bits` for a weight, (rows, columns), whose columns make up for the errors of those before them.

    Column by column, what rounding lost, over U_jj, times U's row is taken from the columns that follow, U being the
    upper Cholesky factor of (X·Xᵀ + damping)⁻¹. A zero stays one: what it is given of earlier errors it gives on when
    its column is reached, which loses less than if it were given none. Scales of a group are chosen when it is
    reached, an error of column j counting 1 / U_jj².

    Args:
        statistics: with `gram`, (columns, columns).
        group: columns that share a scale; 0 for all of a row.
        scales: how they are chosen, a name in `SCALES`.

    Frantar et al., 2022, https://arxiv.org/abs/2210.17323, algorithm 1, with the zeros as one more constraint.
    """
    factor, most = statistics.inverse_factor(damping).factor, largest(bits)
    # transposed, so that each column lies together in memory
    new = weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    columns, gone = len(new), new == 0
    numbers = torch.empty(new.shape, dtype=torch.int8, device=new.device)
    importance = factor.diagonal().square().reciprocal()
    groups, found = list(groups_of(columns, group)), []
    # Whole groups, so that a scale is chosen from weights that have been given all that they are.
    width = max(WIDTH // group, 1) * group if group else WIDTH
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, upper = new[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            if (start + j) % (group or columns) == 0:
                here = groups[len(found)]
                # Zeros hold what they were given, and no weight.
                part = new[here].masked_fill(gone[here], 0).t()
                found.append(SCALES[scales](part, importance[None, here], most))
            numbers[start + j] = nearest(block[j, :, None], found[-1], most, gone[start + j, :, None])[:, 0]
            torch.sub(block[j], numbers[start + j] * found[-1], out=errors[j]).div_(upper[j, j])
            block[j:].addr_(upper[j, j:], errors[j], alpha=-1)
        new[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return Grid(numbers.t().contiguous(), torch.stack(found, dim=1), group)


@torch.no_grad()
def settled(
    weight: Tensor,
    grid: Grid,
    statistics: LayerStatistics,
    bits: int,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> Grid:
    """A grid whose numbers, one column after the other, become the best for all others as they are; its scales stay.

    What is lowered is Σ ‖(grid − W) x‖² + damping, which no step raises. Unlike in feedback, a column looks at those
    behind it as well.

    Args:
        weight: (rows, columns), what the grid is to be.
        statistics: with `gram`, (columns, columns).

    Nair & Suggala, 2024, https://arxiv.org/abs/2406.17542, coordinate descent, with the zeros held.
    """
    most, columns = largest(bits), weight.shape[1]
    hessian = damped(statistics.second_moment, damping)
    numbers, gone = grid.numbers.t().contiguous(), (grid.numbers == 0).t().contiguous()
    scales = grid.scales.repeat_interleave(grid.group or columns, dim=1)[:, :columns].t().contiguous()
    values = grid.weights().t().contiguous()
    slopes = hessian @ (values - weight.t())
    for _ in range(sweeps):
        for start in range(0, columns, WIDTH):
            stop = min(start + WIDTH, columns)
            here, slope, moved = hessian[start:stop, start:stop], slopes[start:stop].clone(), []
            for j, column in enumerate(range(start, stop)):
                wanted = values[column] - slope[j] / here[j, j]
                number = nearest(wanted[:, None], scales[column], most, gone[column, :, None])[:, 0]
                moved.append(number * scales[column] - values[column])
                values[column] += moved[-1]
                numbers[column] = number
                slope.addr_(here[j], moved[-1])
            # One product for all columns, instead of a rank-one update per column.
            slopes.addmm_(hessian[:, start:stop], torch.stack(moved))
    return Grid(numbers.t().contiguous(), grid.scales, grid.group)


class StayOnGrid:
    """Moves a tensor to the nearest numbers on the grid that it lay on at first: scales and zeros stay what they are.

    Args:
        tensor: (..., rows, columns), whose matrices lie on a grid of `bits`, as they are or transposed.

    Raises:
        ValueError: it lies on none.
    """

    def __init__(self, tensor: Tensor, bits: int):
        found = grid_in(tensor, bits)
        if found is None:
            raise ValueError(
                f"A weight of {tuple(tensor.shape)} lies on no grid of {bits} bits, and cannot stay on it."
            )
        grid, self.exchanged = found
        self.scales, self.group, self.most = grid.scales, grid.group, largest(bits)
        self.gone = grid.numbers == 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The nearest to a tensor of the first one's shape, in float32."""
        turned = tensor.mT if self.exchanged else tensor
        near = to_scales(turned.reshape(self.gone.shape), self.scales, self.group, self.most, self.gone)
        found = near.weights().view(turned.shape)
        return found.mT if self.exchanged else found
