"""Patterns: scores and a number of weights to remove -> keep masks (True = keep).

A mask removes exactly the number asked for, ties broken by position, and masks of the same scores nest: what is removed
at one count is removed at every higher one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def check(self, name: str, in_features: int) -> None:
        """Raise `ValueError` where a matrix named `name` of `in_features` columns cannot carry this pattern."""
        if self.kind in ("n:m", "mixed") and in_features % self.width:
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
                here = count_in_columns(count, columns, start, stop)
                keep[:, start:stop] = Pattern("matrix").keep(scores[:, start:stop], here)
            return keep
        removed = self.width - self.kept if self.kind == "n:m" else round(count * self.width / scores.numel())
        groups = scores.unflatten(1, (-1, self.width))
        order = groups.argsort(dim=2, stable=True)[..., :removed]
        return torch.ones_like(groups, dtype=torch.bool).scatter_(2, order, False).flatten(1)


def count_in_columns(count: int, columns: int, start: int, stop: int) -> int:
    """How many of `count` weights fall to the columns [start, stop): equal shares, the first columns one more.

    Never falls as `count` rises, so that masks nest.
    """
    base, extra = divmod(count, columns)
    return base * (stop - start) + min(max(extra - start, 0), stop - start)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` lowest of a vector; among equals the first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    lowest = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    lowest[ties[: count - int(lowest.sum())]] = True
    return lowest


def _lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """True for the lowest of every row, `count` in all; rows differ by one at most.

    The rows that give one more are those whose next weight has the lowest score.
    """
    rows, columns = scores.shape
    base, extra = divmod(min(max(count, 0), scores.numel()), rows)
    ordered = scores.sort(dim=1).values
    counts = torch.full((rows, 1), base, device=scores.device)
    if extra:
        counts += _lowest(ordered[:, base], extra)[:, None]
    threshold = ordered.gather(1, (counts - 1).clamp_min(0))
    lowest = (scores < threshold) & (counts > 0)
    missing = counts - lowest.sum(dim=1, keepdim=True)
    equal = scores == threshold
    if torch.equal(equal.sum(dim=1, keepdim=True) * (counts > 0), missing):
        return lowest.logical_or_(equal & (counts > 0))
    return lowest.logical_or_(equal & (equal.cumsum(dim=1) <= missing))
