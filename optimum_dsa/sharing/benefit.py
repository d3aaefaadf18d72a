"""What a model gives its user, as it was measured: disk, memory and speed beside another, on a named machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .outcome import Outcome, last_part


_NOT_FELT = ("parameters", "FLOPs a token")  # nobody pays for them


def benefits(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str, list[str], list[Sequence[str]]]]:
    """Heading, caption, header and rows for each of `outcomes` of which a measurement lies in its folder."""
    for outcome in outcomes:
        if (found := outcome.speed) is not None:
            own = next(iter(found.speeds.values())).model
            shown = [
                replace(speed, model=outcome.name if speed.model == own else last_part(speed.model)).shown
                for speed in found.speeds.values()
            ]
            header = ["", *shown, *(["ratio"] if len(shown) == 2 else [])]
            rows = [row for row in found.rows() if row[0] not in _NOT_FELT]
            heading = "What it gives" + (f": {outcome.name}" if len(outcomes) > 1 else "")
            yield heading, f"Measured: {found.how}. On {found.where}.", header, rows


def benefit_tile(outcome: Outcome) -> list[tuple[str, str, str]]:
    """How many times as fast a model writes as the one that it was measured beside: label, value, note."""
    if outcome.speed is None or len(outcome.speed.speeds) < 2:
        return []
    first, *_, last = outcome.speed.speeds.values()
    form = f", {first.form}" if first.form else ""
    note = f"times the tokens a second of {last_part(last.shown)}{form}; {outcome.speed.where}"
    return [("Writes", f"{first.decode / last.decode:.2f} ×", note)]
