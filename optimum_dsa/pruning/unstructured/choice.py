"""`Choice`: which weights of a matrix an update has to do without; and the table of updates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...common.registry import Registry
from ...model.statistics import DAMPING
from .patterns import Pattern


# Facts of an update: `reads` says what it needs: "nothing" (the default), "mean" (Σ x) or "gram" (X·Xᵀ).
# One that `chooses` is given no mask and takes out `count` weights of its own choice; with `criterion` it does so only
# where that metric is asked for, which it evaluates as it goes, and with `kinds` only for patterns of these kinds. One
# that `moves` is given a mask to begin with, and exchanges what it removes within the pattern's sets.
UPDATES = Registry("update")


@dataclass(frozen=True)
class Choice:
    """Which weights of a matrix go.

    Attributes:
        pattern (`Pattern`): within which sets of weights.
        count (`int`): how many.
        keep (`Tensor`): (out_features, in_features), True = keep; `None` lets the update choose as it goes.
        damping (`float`): share of the mean of diag(X Xᵀ) that is added to it, where an update inverts it.
        gone (`Tensor`): (out_features, in_features), True where the weight was zero before and has to stay so, which
            counts; `None` where there is none. With `keep`, these are among what goes.
    """

    pattern: Pattern
    count: int
    keep: Tensor | None = None
    damping: float = DAMPING
    gone: Tensor | None = None
