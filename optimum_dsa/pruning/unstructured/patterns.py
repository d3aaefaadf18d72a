"""Patterns: scores and a number of weights to remove -> keep masks (True = keep).

A mask removes exactly the number asked for, ties broken by position, and masks of the same scores nest: what is
removed at one count is removed at every higher one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


CHUNK = 2**20  # scores that are worked on at once: bounds the memory, and stays in a processor's cache
GPU_CHUNK = 2**24  # the same where there is no cache to stay in, and every call has to be worth its launch
KINDS = "'row', 'matrix', 'group:128' (any width), 'N:M' such as '2:4', or 'mixed:M' such as 'mixed:8'"


@dataclass(frozen=True)
class Pattern:
    """Within which set of weights the lowest scores are removed.

    | text        | kind   | the lowest are taken ...                                                        |
    |-------------|--------|---------------------------------------------------------------------------------|
    | `row`       | row    | per output row, the same share of each (Wanda)                                  |
    | `matrix`    | matrix | over the whole matrix (magnitude)                                               |
    | `group:128` | group  | per 128 neighbouring columns, over all rows (SparseGPT)                         |
    | `2:4`       | n:m    | of every M neighbouring inputs of a row, N are kept                             |
    | `mixed:8`   | mixed  | N:8, where N follows from each unit's sparsity in the allocation                |
    """

    kind: str
    width: int = 0
    kept: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern that `text` names; `ValueError` says which texts there are."""
        if text in ("row", "matrix"):
            return cls(text)
        if match := re.fullmatch(r"(group|mixed):(\d+)", text):
            width = int(match[2])
            if width >= (1 if match[1] == "group" else 2):
                return cls(match[1], width)
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            kept, width = int(match[1]), int(match[2])
            if 0 < kept < width:
                return cls("n:m", width, kept)
        raise ValueError(f"Unknown pattern {text!r}: expected {KINDS}, with 0 < N < M.")

    def __str__(self) -> str:
        return {
            "group": f"group:{self.width}",
            "mixed": f"mixed:{self.width}",
            "n:m": f"{self.kept}:{self.width}",
        }.get(self.kind, self.kind)

    @property
    def sparsity(self) -> float | None:
        """The one sparsity that an N:M pattern has; `None` for a pattern that takes any."""
        return 1 - self.kept / self.width if self.kind == "n:m" else None

    @property
    def in_groups(self) -> bool:
        """Whether whole numbers are removed from every M neighbours: N:M, the same N everywhere or not."""
        return self.kind in ("n:m", "mixed")

    def fits(self, in_features: int) -> bool:
        """Whether a matrix of `in_features` columns can carry this pattern."""
        return not (self.in_groups and in_features % self.width)

    def check(self, name: str, in_features: int) -> None:
        """Raise `ValueError` where a matrix named `name` of `in_features` columns cannot carry this pattern."""
        if not self.fits(in_features):
            raise ValueError(
                f"{name}: pattern {self} needs in_features divisible by {self.width}, got {in_features}; "
                f"leave it dense with exclude=['{name}'] or choose another pattern."
            )

    @torch.no_grad()
    def keep(self, scores: Tensor, count: int) -> Tensor:
        """Boolean mask of the shape of `scores`, (out_features, in_features), that removes the `count` lowest.

        For "n:m" and "mixed" the count is rounded to a whole number per group of M.
        """
        if self.kind == "row":
            return _lowest_per_row(scores, count).logical_not_()
        if self.kind == "matrix":
            return _lowest(scores.flatten(), count).view_as(scores).logical_not_()
        columns = scores.shape[1]
        if self.kind == "group":
            keep = torch.empty_like(scores, dtype=torch.bool)
            for start in range(0, columns, self.width):
                stop = min(start + self.width, columns)
                # By shares of the count, and not by rounding in each group, which would miss the total.
                here = count_in_columns(count, columns, start, stop)
                keep[:, start:stop] = Pattern("matrix").keep(scores[:, start:stop], here)
            return keep
        removed = self.width - self.kept if self.kind == "n:m" else round(count * self.width / scores.numel())
        return torch.cat([_keep_in_groups(part, self.width, removed) for part in _chunks(scores)])

    def holds(self, removed: Tensor, count: int) -> bool:
        """Whether a matrix whose zeros are `removed`, (out_features, in_features), can come from `keep` at `count`.

        More zeros than asked for are no breach: some weights are zero by themselves.
        """
        if self.in_groups:
            per_group = self.width - self.kept
            if self.kind == "mixed":
                per_group = round(count * self.width / removed.numel())
            return removed.shape[1] % self.width == 0 and all(
                int(part.unflatten(1, (-1, self.width)).sum(2).min()) >= per_group for part in _chunks(removed)
            )
        if self.kind == "row":
            of_rows = removed.sum(1)
            return int(of_rows.min()) >= count // len(removed) and int(of_rows.sum()) >= count
        # A group is some whole columns, so that its zeros are the sum of theirs.
        columns = removed.sum(0)
        width = self.width if self.kind == "group" else len(columns)
        return all(
            int(part.sum()) >= count_in_columns(count, len(columns), start, start + len(part))
            for start, part in zip(range(0, len(columns), width), columns.split(width))
        )


def count_in_columns(count: int, columns: int, start: int, stop: int) -> int:
    """How many of `count` weights fall to the columns [start, stop): equal shares, the first columns one more.

    Never falls as `count` rises, so that masks nest.
    """
    base, extra = divmod(count, columns)
    return base * (stop - start) + min(max(extra - start, 0), stop - start)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` lowest of a vector, (n,) -> (n,) bool; among equals the first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    # One threshold instead of a sort of the whole matrix; what equals it is told apart by position.
    threshold = kth_by_extremes(scores, count) if scores.is_cuda else scores.kthvalue(count).values
    lowest, ties = scores < threshold, scores == threshold
    # Without waiting for a number, which a GPU would stand still for.
    return lowest.logical_or_(ties.logical_and_(ties.cumsum(0, dtype=torch.int32) <= count - lowest.sum()))


def kth_by_extremes(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest, from 1, of a vector, (n,) -> (): the last of those that lie on its side of the middle.

    A GPU's kthvalue works on a vector with one of its hundred processors; its topk works with all.
    """
    above = scores.numel() - count + 1
    if count <= above:
        return scores.topk(count, largest=False, sorted=False).values.max()
    return scores.topk(above, sorted=False).values.min()


def _lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """True for the lowest of every row, `count` in all: the same number of each, the first rows one more.

    (rows, columns) -> (rows, columns) bool.
    """
    base, more = divmod(min(max(count, 0), scores.numel()), len(scores))
    runs = ((scores[:more], base + 1), (scores[more:], base))
    return torch.cat([_lowest_of_rows(part, number) for run, number in runs if len(run) for part in _chunks(run)])


def _chunks(scores: Tensor) -> tuple[Tensor, ...]:
    """Runs of rows of at most CHUNK scores each: (rows, columns) -> (some, columns) each."""
    return scores.split(max((GPU_CHUNK if scores.is_cuda else CHUNK) // scores.shape[1], 1))


def _lowest_of_rows(scores: Tensor, number: int) -> Tensor:
    """True for the `number` lowest of every row, (rows, columns) -> the same bool; among equals the first."""
    if number == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    highest = scores.kthvalue(number, dim=1, keepdim=True).values
    lowest = scores <= highest
    # Mostly no score equals the threshold but itself, and nothing is left to do.
    surplus = lowest.sum(dim=1, keepdim=True) - number
    if surplus.any():
        equal = scores == highest
        order = equal.cumsum(dim=1, dtype=torch.int32)
        lowest &= ~equal | (order <= order[:, -1:] - surplus)
    return lowest


def keep_by_numbers(scores: Tensor, numbers: Tensor) -> Tensor:
    """False for the lowest of every row, (rows, columns), as many as its number, (rows,); among equals the first."""
    parts = zip(_chunks(scores), numbers.split(len(_chunks(scores)[0])))
    return torch.cat([_ranks(part) >= own[:, None] for part, own in parts])


def _keep_in_groups(scores: Tensor, width: int, removed: int) -> Tensor:
    """False for the `removed` lowest of every `width` neighbours of a row, (rows, columns); among equals the first."""
    groups = scores.unflatten(1, (-1, width))
    # Unlike topk, a stable sort says which of equal scores comes first, on every device.
    order = groups.argsort(dim=2, stable=True)[..., :removed]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(2, order, False).flatten(1)


def removal_order(pattern: Pattern, scores: Tensor) -> Tensor:
    """When each weight goes: (out_features, in_features) int64, the weights of order < count being those removed.

    `pattern.keep(scores, count) == (removal_order(pattern, scores) >= count)` for every count, so that one order holds
    the masks of all sparsities. For N:M, `count` must be a whole number per group.
    """
    rows, columns = scores.shape
    if pattern.kind == "matrix":
        return _ranks(scores.flatten()).view_as(scores)
    if pattern.kind == "row":
        # the k-th lowest of every row goes before any (k+1)-th; among the k-th, those of the first rows
        return _ranks(scores) * rows + torch.arange(rows, device=scores.device)[:, None]
    if pattern.kind == "group":
        order = torch.empty_like(scores, dtype=torch.int64)
        for start in range(0, columns, pattern.width):
            stop = min(start + pattern.width, columns)
            within = removal_order(Pattern("matrix"), scores[:, start:stop].contiguous())
            # the count at which a group of columns has given `within + 1` weights, see count_in_columns
            base, extra = within // (stop - start), within % (stop - start)
            order[:, start:stop] = base * columns + start + extra
        return order
    groups = scores.unflatten(1, (-1, pattern.width))
    return (_ranks(groups) * (scores.numel() // pattern.width)).flatten(1)


def _ranks(scores: Tensor) -> Tensor:
    """Rank of every entry along the last dimension, from 0, (..., n) -> (..., n) int64; equal ones by position."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
