"""Text in columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def columns(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Lines of cells as lines of text, two spaces between columns: those in `left` begin, all others end, together.

    A negative number counts columns from the last.
    """
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    begins = {number % len(widths) for number in left}
    return [
        "  ".join(
            cell.ljust(width) if number in begins else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
