"""Allocation functions: what DSA searches for, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .operations import POST_PROCESS, PRE_PROCESS, REDUCTION, TRANSFORM
from .unit import Unit


PUBLISHED = re.compile(r"W:\(([\w,]*)\)-\((\w+)\)-\(([\w,]*)\)(?:-\((\d+)\))?", re.IGNORECASE)
OURS = re.compile(r"([\w,]*)/(\w+)/([\w,]*)(?:/(\w+))?(?:@([+-]?)([\d.]+(?:e-?\d+)?))?", re.IGNORECASE)


@dataclass(frozen=True)
class AllocationFunction:
    """pre-process ─► reduction ─► transform ─► post-process, and how the result becomes sparsities.

    Written `abslog/var/atan,asin/no_op@+0.08`: operations of one stage are joined by commas, stages by slashes; after
    the @ stand `sign` and `spread`. The published code's `W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)` is read as well; its last
    field is parsed and never used there, nor here.

    Attributes:
        pre_process (`tuple[str, ...]`): up to two names of `PRE_PROCESS`, applied to the scores of a unit.
        reduction (`str`): a name of `REDUCTION`: scores -> one number.
        transform (`tuple[str, ...]`): up to two names of `TRANSFORM`, applied to that number.
        post_process (`str`): a name of `POST_PROCESS`, applied to the numbers of all units.
        sign (`int`): +1 where a higher number means more sparsity (DSA, DLP), -1 where it means less (OWL).
        spread (`float`): half the distance between the most and the least pruned unit before the budget is fitted.

    Li et al., NeurIPS 2024, https://github.com/lliai/DSA.
    """

    pre_process: tuple[str, ...] = ()
    reduction: str = "mean"
    transform: tuple[str, ...] = ()
    post_process: str = "no_op"
    sign: int = 1
    spread: float = 0.08

    reads = "scores"
    granularity = None

    def __post_init__(self):
        for stage, table in ((self.pre_process, PRE_PROCESS), (self.transform, TRANSFORM)):
            if len(stage) > 2:
                raise ValueError(f"At most two operations are a {table.kind}, got {', '.join(stage)}.")
            for name in stage:
                table[name]
        REDUCTION[self.reduction]
        POST_PROCESS[self.post_process]
        if self.sign not in (-1, 1):
            raise ValueError(f"The sign of an allocation function is +1 or -1, got {self.sign!r}.")
        if not (math.isfinite(self.spread) and 0 <= self.spread <= 1):
            raise ValueError(f"The spread of an allocation function is a half-width in [0, 1], got {self.spread!r}.")

    @classmethod
    def parse(cls, text: str) -> AllocationFunction:
        """The function that `text` writes, in our form or the published one."""
        if found := PUBLISHED.fullmatch(text.strip()):
            pre, reduction, transform, _ = found.groups()
            return cls(_names(pre), reduction.lower(), _names(transform))
        if found := OURS.fullmatch(text.strip()):
            pre, reduction, transform, post, sign, spread = found.groups()
            try:
                spread = 0.08 if spread is None else float(spread)
            except ValueError:
                raise ValueError(
                    f"Cannot read the spread {spread!r} of {text!r}: expected a number as in @+0.08."
                ) from None
            post = (post or "no_op").lower()
            return cls(_names(pre), reduction.lower(), _names(transform), post, -1 if sign == "-" else 1, spread)
        raise ValueError(
            f"Cannot read the allocation function {text!r}: expected 'pre,../reduction/transform,../post@+spread' as "
            "in 'abslog/var/atan,asin/no_op@+0.08', or the published 'W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)'."
        )

    def __str__(self) -> str:
        stages = (",".join(self.pre_process) or "no_op", self.reduction, ",".join(self.transform) or "no_op")
        return f"{'/'.join(stages)}/{self.post_process}@{'-' if self.sign < 0 else '+'}{self.spread!r}"

    def published(self) -> str:
        """The published form, which has no room for a post-process, a sign or a spread."""
        if self != replace(self, post_process="no_op", sign=1, spread=0.08):
            raise ValueError(f"{self} has a post-process, sign or spread that the published form cannot write.")
        pre, transform = ",".join(self.pre_process) or "NO_OP", ",".join(self.transform) or "NO_OP"
        return f"W:({pre})-({self.reduction})-({transform})-(7)".upper()

    def measure(self, unit: Unit) -> float:
        """The heavy half: pre-process and reduction of one unit's scores."""
        # All matrices of the unit in one vector, as the published code does: large ones count more.
        x = unit.flat_scores()
        for name in self.pre_process:
            x = PRE_PROCESS[name](x)
        if REDUCTION.fact(self.reduction, "matrix"):
            return REDUCTION[self.reduction](unit.split(x)).item()
        return REDUCTION[self.reduction](x).item()

    def importance(self, measured: Tensor) -> Tensor:
        """Transform and post-process of the units' numbers, (..., units) float64; NaN is 0 and ±∞ is −1, as published.

        The published best function relies on it: asin(atan(v)) is NaN, and so 0, the most protected, for v > 1.557.
        """
        x = measured.double()
        for name in self.transform:
            x = TRANSFORM[name](x)
        x = _defined(x)
        if self.post_process == "no_op":
            return x
        # A post-process looks at the units of one function, never at those of another.
        rows = x.reshape(-1, x.shape[-1])
        # Once more: a post-process may leave its domain too.
        return _defined(torch.stack([POST_PROCESS[self.post_process](row) for row in rows])).view_as(x)

    def propose(self, measured: Mapping[str, float], target: float, spread: float | None = None) -> dict[str, float]:
        """The light half: the sparsity that each unit asks for, see `proposals`."""
        function = self if spread is None else replace(self, spread=spread)
        proposed = function.proposals(torch.tensor(list(measured.values()), dtype=torch.float64), target)
        return dict(zip(measured, proposed.tolist()))

    def proposals(self, measured: Tensor, target: float) -> Tensor:
        """Sparsities S + sign · 2 spread · (v − mean v) with v scaled to [0, 1], of numbers (..., units).

        Constant v gives `target` everywhere.
        """
        x = self.importance(measured)
        low, high = x.aminmax(dim=-1, keepdim=True)
        span = high - low
        share = torch.where((span > 0) & (span < torch.inf), (x - low) / span, 0.0)
        return target + self.sign * 2 * self.spread * (share - share.mean(-1, keepdim=True))


def _defined(x: Tensor) -> Tensor:
    """NaN as 0 and ±∞ as −1, as in the published code: of any shape."""
    return x.nan_to_num(nan=0.0, posinf=-1.0, neginf=-1.0)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.lower().split(",") if name and name != "no_op")
