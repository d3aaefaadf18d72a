"""Patterns in a matrix that has zeros already: these are among what goes, and none of them is given back."""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import Pattern, keep_by_numbers


@torch.no_grad()
def keep_beside(pattern: Pattern, scores: Tensor, count: int, gone: Tensor | None) -> Tensor:
    """`pattern.keep(scores, count)` in which what is `gone` goes first: a mask of the same shape, True = keep.

    Of an N:M pattern every group loses its number, or what is gone of it where that is more. Of the others, every set
    (row, columns) gives up equally many weights, except where more are gone already: then the rest give up fewer, so
    that the mask removes exactly `count`, or what is gone where that is more.

    Args:
        scores: (out_features, in_features), non-negative.
        gone: of the same shape, True where the weight is zero before; `None` for a matrix without such.
    """
    if gone is None:
        return pattern.keep(scores, count)
    lowest = scores.masked_fill(gone, -1)
    if pattern.in_groups:
        return pattern.keep(lowest, count).logical_and_(~gone)
    if pattern.kind == "matrix":
        return pattern.keep(lowest, max(count, int(gone.sum())))
    numbers = numbers_of_sets(pattern, gone, count)
    if pattern.kind == "row":
        return keep_by_numbers(lowest, numbers.to(scores.device))
    parts = zip(lowest.split(pattern.width, dim=1), numbers.tolist())
    return torch.cat([Pattern("matrix").keep(part, number) for part, number in parts], dim=1)


def numbers_of_sets(pattern: Pattern, gone: Tensor, count: int) -> Tensor:
    """How many weights every row, or group of columns, loses: (sets,) int64, on the CPU.

    Their sum is `count`, or what is `gone`, (out_features, in_features), where that is more.
    """
    standing = zeros_of_sets(pattern, gone)
    return torch.maximum(standing, _shares(pattern, gone.shape, _level(pattern, gone.shape, standing, count)))


def zeros_of_sets(pattern: Pattern, removed: Tensor) -> Tensor:
    """How many of `removed`, (out_features, in_features) bool, lie in every set of the pattern: (sets,) on the CPU."""
    if pattern.kind == "row":
        return removed.sum(1).cpu()
    columns = removed.sum(0).cpu()
    return torch.stack([part.sum() for part in columns.split(pattern.width or len(columns))])


def could_stand(pattern: Pattern, removed: Tensor, count: int, before: int) -> bool:
    """Whether the zeros of a matrix, `removed`, can come from `keep_beside` at `count`, `before` of them being older.

    Which ones these are, nobody has noted: that sets with more than their share can be made of them is what is told.
    """
    if pattern.holds(removed, count):
        return True
    if not before or pattern.in_groups or pattern.kind == "matrix":
        return False
    standing = zeros_of_sets(pattern, removed)
    # Zeros beyond the count came about by themselves, such as by rounding, and may be in any set.
    chance = int(standing.sum()) - count
    low, high = 0, count  # the highest level that all sets reach
    while low < high:
        middle = (low + high + 1) // 2
        reached = bool((standing >= _shares(pattern, removed.shape, middle)).all())
        low, high = (middle, high) if reached else (low, middle - 1)
    over = standing > _shares(pattern, removed.shape, low) + max(chance, 0)
    return chance >= 0 and int(standing[over].sum()) <= before


def _level(pattern: Pattern, shape: torch.Size, standing: Tensor, count: int) -> int:
    """At how many weights, divided over the sets, these and what is `standing`, (sets,), come to `count`."""
    low, high = 0, count
    # One weight more raises one set by one, or none: the first level to reach the count meets it.
    while low < high:
        middle = (low + high) // 2
        enough = int(torch.maximum(standing, _shares(pattern, shape, middle)).sum()) >= count
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def _shares(pattern: Pattern, shape: torch.Size, count: int) -> Tensor:
    """How many of `count` weights every set loses of a matrix without zeros: (sets,) int64, as `Pattern.keep` does."""
    length, width = (shape[0], 1) if pattern.kind == "row" else (shape[1], pattern.width or shape[1])
    start = torch.arange(0, length, width)
    wide = (start + width).clamp_max(length) - start
    base, extra = divmod(count, length)
    return base * wide + torch.minimum((extra - start).clamp_min(0), wide)
