"""`eliminate` as one Triton kernel: rows beside each other, the loop over the columns inside.

Rows are independent once U is there; column by column in PyTorch, four launches each, a GPU waits for them.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


ROWS = 16  # of a program, of four warps: compiled for a H100, 128 columns of so many stay in registers


def eliminate_in_one(
    block: Tensor, upper: Tensor, dead: Tensor, keep: Tensor | None, neighbours: int = 0, removed: int = 0
) -> Tensor:
    """As `eliminate`, to rounding: (width, out_features), `block` of that shape changed in place."""
    width, rows = block.shape
    errors = torch.empty_like(block)
    # By columns, as everything else is read.
    kept = torch.empty(0, dtype=torch.uint8, device=block.device) if keep is None else keep.t().contiguous()
    # Triton launches on the current device, whichever its tensors are on.
    with torch.cuda.device(block.device) if block.is_cuda else nullcontext():
        _eliminate[(triton.cdiv(rows, ROWS),)](
            block,
            upper,
            errors,
            kept.view(torch.uint8),
            dead.contiguous().view(torch.uint8),
            rows,
            width,
            block.stride(0),
            upper.stride(0),
            upper.stride(1),
            errors.stride(0),
            max(neighbours, 1),
            removed,
            CHOOSES=neighbours > 0,
            GIVEN=keep is not None,
            ROWS=ROWS,
            WIDTH=triton.next_power_of_2(width),
        )
    return errors


@triton.jit
def _eliminate(
    block,
    upper,
    errors,
    keep,
    dead,
    rows,
    width,
    block_stride,
    upper_stride,
    upper_column_stride,
    error_stride,
    neighbours,
    removed,
    CHOOSES: tl.constexpr,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: `ROWS` rows and all columns of the block, (width, rows), in registers; shapes as in `eliminate`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here, there = row < rows, column < width
    places = column[None, :] * block_stride + row[:, None]
    inside = here[:, None] & there[None, :]
    values = tl.load(block + places, mask=inside, other=0.0)
    kept = tl.full((ROWS, WIDTH), 1, tl.int32)
    if CHOOSES and GIVEN:
        kept = (tl.load(keep + column[None, :] * rows + row[:, None], mask=inside, other=1) != 0).to(tl.int32)
    diagonal = tl.load(upper + column * (upper_stride + upper_column_stride), mask=there, other=1.0)
    first = tl.load(dead + column, mask=there, other=0) != 0
    for j in range(width):
        if CHOOSES:
            if j % neighbours == 0:
                scores = values / diagonal[None, :]
                scores = tl.where(first[None, :], 0.0, scores * scores)
                scores = tl.where(kept == 0, -1.0, scores)
                # How many of the group go before each: the lower ones and, among equals, those that stand before it.
                rank = tl.full((ROWS, WIDTH), 0, tl.int32)
                for other in range(j, j + neighbours):
                    one = tl.sum(tl.where(column[None, :] == other, scores, 0.0), axis=1)[:, None]
                    before = (one < scores) | ((one == scores) & (other < column[None, :]))
                    rank += before.to(tl.int32)
                group = (column >= j) & (column < j + neighbours)
                kept = tl.where(group[None, :] & (rank < removed), 0, kept)
            stays = tl.sum(tl.where(column[None, :] == j, kept, 0), axis=1) != 0
        else:
            stays = tl.load(keep + j * rows + row, mask=here, other=1) != 0
        # A sum over zeros and one value is that value: registers have no index.
        value = tl.sum(tl.where(column[None, :] == j, values, 0.0), axis=1)
        pivot = tl.load(upper + j * (upper_stride + upper_column_stride))
        error = tl.where(stays, 0.0, value / pivot)
        tl.store(errors + j * error_stride + row, error, mask=here)
        behind = tl.load(upper + j * upper_stride + column * upper_column_stride, mask=there & (column > j), other=0.0)
        values -= error[:, None] * behind[None, :]
        values = tl.where((column[None, :] == j) & (stays[:, None] == 0), 0.0, values)
    tl.store(block + places, values, mask=inside)
