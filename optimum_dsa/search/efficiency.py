"""How well the processes of a search use their time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Shift:
    """What one process did for the answers of a search.

    Attributes:
        seconds: in which it computed.
        waited: seconds in which it waited for the others.
        tokens: validation tokens that it read; a backward pass counts as two forward passes.
    """

    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0

    @property
    def speed(self) -> float:
        """Tokens a second of the time in which it computed."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        """JSON values."""
        return {"seconds": round(self.seconds, 3), "waited": round(self.waited, 3), "tokens": self.tokens}


def efficiency(shifts: Sequence[Shift]) -> float:
    """The share of all processes' time in which they computed; the rest they waited. 0 where nothing was computed."""
    busy, waited = sum(shift.seconds for shift in shifts), sum(shift.waited for shift in shifts)
    return busy / (busy + waited) if busy else 0.0


def efficiency_line(shifts: Sequence[Shift]) -> str:
    """What the summary of a search says of its processes."""
    waited = ", ".join(f"{shift.waited:.1f}" for shift in shifts)
    speeds = ", ".join(f"{shift.speed:,.0f}" for shift in shifts)
    return (
        f"{len(shifts)} processes: {efficiency(shifts):.0%} of their time went into candidates; they waited for each "
        f"other {waited} s, and read {speeds} tokens a second"
    )
