"""`train[:50]`: a split's name and which of its rows are taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any


_BOUND = r"(-?\d+%?)?"
_PART = re.compile(rf"(?P<name>[^\[\]+]+)(?:\[{_BOUND}:{_BOUND}\])?")


@dataclass(frozen=True)
class Slice:
    """Some rows of a split.

    Attributes:
        name: of the split.
        start, stop: as in Python's slices, or with a % sign; `None` where there is no bound.
    """

    name: str
    start: str | None = None
    stop: str | None = None

    @property
    def whole(self) -> bool:
        """Whether all rows are meant."""
        return self.start is None and self.stop is None

    @property
    def needs_count(self) -> bool:
        """Whether it takes the number of rows to know which are meant."""
        return any("%" in bound or bound.startswith("-") for bound in (self.start, self.stop) if bound)

    def of(self, rows: Iterable[Any], count: Callable[[], int]) -> Iterator[Any]:
        """The rows that are meant; `count` says how many there are, and is asked only where that matters."""
        if self.whole:
            return iter(rows)
        total = count() if self.needs_count else None
        start = _place(self.start, total, 0)
        stop = None if self.stop is None else _place(self.stop, total, 0)
        # what is skipped is never decoded where the rows can do so themselves
        if start and hasattr(rows, "skip"):
            rows, stop, start = rows.skip(start), None if stop is None else max(stop - start, 0), 0
        return islice(iter(rows), start, stop)


def parse_split(text: str) -> list[Slice]:
    """The parts of a split as `datasets` writes them: "train", "train[:50]", "train[10%:20%]+test".

    Raises:
        ValueError: it is no such text.
    """
    found = []
    for part in text.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"split is a name, or rows of it such as 'train[:50]' or 'train[:10%]'; got {text!r}.")
        found.append(Slice(match["name"], match[2], match[3]))
    return found


def _place(bound: str | None, total: int | None, otherwise: int) -> int:
    """The row that a bound names, out of `total`."""
    if bound is None:
        return otherwise
    number = int(bound.rstrip("%"))
    if bound.endswith("%"):
        number = round(number * total / 100)
    return max(number + total, 0) if number < 0 else number
