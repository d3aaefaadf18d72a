"""Named allocations compared, where `allocation="auto"` asks for the best: on how much text, and with what lead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.values import is_number, is_whole


# Windows that allocations are judged on, as a share of those that calibrate: few, since each is a prune besides.
SHARE = 0.25
# The best one's lead over the next, as a share of the next one's loss, below which so few windows decide by chance: a
# loss over a few thousand tokens tells apart what differs by more than a per cent.
CLOSE = 0.01


def windows_apart(samples: int) -> int:
    """Windows to judge by beside `samples` that calibrate."""
    return max(int(SHARE * samples), 1)


def compared_lines(compared: Any, on: Any) -> dict[str, str]:
    """What was found, as lines for people: "losses", "judged on" and "lead"; what a file has wrong is left out.

    Args:
        compared: allocation -> validation loss of the model pruned with it.
        on: "windows" and "length" of what they were judged on; empty where a release before did not say.
    """
    compared, on = (given if isinstance(given, Mapping) else {} for given in (compared, on))
    losses = {name: loss for name, loss in compared.items() if is_number(loss)}
    if not losses:
        return {}
    found = {"losses": ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())}
    if is_whole(on.get("windows")) and is_whole(on.get("length")):
        found["judged on"] = f"{on['windows']} windows of {on['length']} tokens that do not calibrate"
    (best, loss), *others = sorted(losses.items(), key=lambda row: row[1])
    if others:
        second, next_loss = others[0]
        lead = (next_loss - loss) / next_loss if next_loss > 0 else 0.0
        found["lead"] = f"{best} is {lead:.1%} below {second}"
        if lead < CLOSE:
            found["lead"] += ", which so few windows hardly tell apart"
    return found
