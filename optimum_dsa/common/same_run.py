"""Whether what an interrupted run left was made as the one is that wants to go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


FINGERPRINTS = "sha256"  # the entry of a run's settings that tells models and texts apart by what they hold


def check_same_run(run: str, known: Mapping[str, Any], now: Mapping[str, Any], way_out: str) -> None:
    """Raise `ValueError` where `run`, such as "The search in FOLDER", was made with other settings than `now`.

    Args:
        known: the settings that it was made with, as JSON values, those under `FINGERPRINTS` among them.
        way_out: what can be done instead of going on.
    """
    prints, own = known.get(FINGERPRINTS), now.get(FINGERPRINTS) or {}
    prints = prints if isinstance(prints, Mapping) else {}
    # Settings first: their difference can be read, that of fingerprints cannot.
    for name in sorted({*known, *now} - {FINGERPRINTS}):
        if known.get(name) != now.get(name):
            raise ValueError(
                f"{run} was made with {name}={known.get(name)!r}, not {now.get(name)!r}; resume it with the same "
                f"settings, or {way_out}."
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
