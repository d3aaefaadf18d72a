"""Whether what an interrupted run left was made as the one is that wants to go on with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .values import short


FINGERPRINTS = "sha256"  # the entry of a run's settings that tells models and texts apart by what they hold
MOST = 4  # differences that are named


def check_same_run(run: str, known: Mapping[str, Any], now: Mapping[str, Any], way_out: str) -> None:
    """Raise `ValueError` where `run`, such as "The search in FOLDER", was made with other settings than `now`.

    Args:
        known: the settings that it was made with, as JSON values, those under `FINGERPRINTS` among them.
        way_out: what can be done instead of going on.
    """
    prints, own = known.get(FINGERPRINTS), now.get(FINGERPRINTS) or {}
    prints = prints if isinstance(prints, Mapping) else {}
    # Settings first: their difference can be read, that of fingerprints cannot.
    if differing := list(_differences(known, now)):
        more = f" and {len(differing) - MOST} more" if len(differing) > MOST else ""
        raise ValueError(
            f"{run} was made with {', '.join(differing[:MOST])}{more}; resume it with the same settings, or {way_out}."
        )
    for name, value in own.items():
        if name not in prints:
            raise ValueError(
                f"{run} does not say with which {name} it was made, so it cannot be told whether it can go on with "
                f"this; {way_out}."
            )
        if prints[name] != value:
            raise ValueError(
                f"{run} was made with another {name} (its content differs, whatever its name); resume it with the "
                f"same, or {way_out}."
            )


def _differences(known: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Each setting that differs, old and new: `data.seed=0, not 1`; sections are gone into, and not shown whole."""
    # What was read of a text follows from settings, and comes behind them.
    for name in sorted(
        {*known, *now} - {FINGERPRINTS}, key=lambda name: (name in ("calibration", "validation"), name)
    ):
        old, new = known.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{place}{name}.")
        else:
            yield f"{place}{name}={short(old)}, not {short(new)}"
