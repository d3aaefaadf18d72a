"""Whether text that judges is other text than that which something was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor


FEW = 0.05  # share of the judging windows up to which shared ones are by chance: texts repeat themselves


def same_source(one: Any, other: Any) -> bool:
    """Whether two sources of text are one file, in whatever way it is named, or one dataset."""
    if not all(isinstance(source, (str, Path)) for source in (one, other)):
        return False
    there = [Path(source) for source in (one, other)]
    return str(one) == str(other) or (all(path.exists() for path in there) and there[0].samefile(there[1]))


def shared_windows(known: Tensor, judging: Tensor) -> int:
    """How many of the `judging` windows are among the `known` ones; (windows, length) each.

    Windows of two lengths are compared in pieces of the shorter one.
    """
    length = min(known.shape[1], judging.shape[1])
    seen = {piece for window in known for piece in _pieces(window, length)}
    return sum(any(piece in seen for piece in _pieces(window, length)) for window in judging)


def _pieces(window: Tensor, length: int) -> list[bytes]:
    """The whole pieces of a window, (length of the window,), as bytes that can be looked up in a set."""
    # In one dtype: equal tokens may come as int32 and as int64.
    return [piece.long().cpu().numpy().tobytes() for piece in window.split(length) if len(piece) == length]
