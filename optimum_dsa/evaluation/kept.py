"""Measurements of a dense model, kept: each model pruned from it is compared with it, and it does not change."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants

from ..common.escaping import one_line
from ..common.files import write_text
from ..common.hub_file import hub_commit
from .measurement import Measurement
from .results import read_results, results_json


logger = logging.getLogger(__name__)

# What a model's numbers depend on; the rest of a folder may change.
DECIDES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja")


def measured_once(model: str, like: Measurement, measure: Callable[[], Measurement], **options) -> Measurement:
    """What was kept of the model at a path or Hub id by the protocols of `like`; else `measure()`, kept from now on.

    Two texts of one name are told apart by the fingerprint of their tokens, two states of a folder by its files' sizes
    and times, and of a Hub model by its commit. What cannot be told apart is measured each time.

    Args:
        options: `revision` and `token` of a Hub model.
    """
    place = _place(model, **options)
    kept = _read(place)
    asked = like.protocol, like.task_protocol, like.tasks.keys()
    for row in kept:
        if (row.protocol, row.task_protocol, row.tasks.keys()) == asked:
            return row
    found = measure()
    if place is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, results_json([*kept, found]) + "\n")
        # A full disk costs the keeping, not the measurement.
        except OSError as error:
            logger.info("%s is not kept: %s", found.model, one_line(str(error)))
    return found


def _place(model: str, **options) -> Path | None:
    """The file that keeps the measurements of a model as it is now; `None` where that cannot be told."""
    folder = Path(model)
    if folder.is_dir():
        files = sorted({file for pattern in DECIDES for file in folder.glob(pattern)})
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        state = repr((str(folder.resolve()), states))
    elif commit := hub_commit(model, **options):
        state = f"{model}@{commit}"
    else:
        return None
    name = hashlib.sha256(state.encode()).hexdigest()[:32]
    return Path(constants.HF_HOME) / "optimum-dsa" / "dense" / f"{name}.json"


def _read(place: Path | None) -> list[Measurement]:
    if place is None or not place.is_file():
        return []
    try:
        return read_results(place)
    except (ValueError, OSError) as error:
        logger.info("What was kept is not read: %s", one_line(str(error)))
        return []
