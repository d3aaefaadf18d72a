"""The Trainer's checkpoints that a recovery goes on from."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.shards import open_shard
from ..common.files import read_json


logger = logging.getLogger(__name__)


def last_whole_checkpoint(folder: Path, files: Sequence[str] = ()) -> Path | None:
    """The last checkpoint in `folder` that was written to its end, with all of `files`; `None` where there is none.

    What is passed over, or that the run begins anew, is said: whoever resumes expects to go on from the last one.
    """
    # By number and not by name or time: "checkpoint-1000" comes after "checkpoint-200".
    steps = {path: int(found[1]) for path in folder.glob("checkpoint-*") if (found := _step(path))}
    latest_first = sorted(steps, key=steps.__getitem__, reverse=True)
    last = next((path for path in latest_first if _is_whole(path, steps[path], files)), None)
    for path in latest_first[: None if last is None else latest_first.index(last)]:
        logger.warning("%s was not written to its end; it is passed over.", path)
    if last is None:
        logger.warning("%s holds no whole checkpoint; training begins at the first step.", folder)
    else:
        logger.info("Training goes on from %s.", last)
    return last


def _step(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def _is_whole(path: Path, step: int, files: Sequence[str]) -> bool:
    """Whether the Trainer's state, which it writes last, and `files` are there, and the weights are as long as said.

    `files` are written after that state, each whole or not at all.
    """
    if not all((path / name).is_file() for name in files):
        return False
    try:
        state = read_json(path / "trainer_state.json")
        weights = sorted(path.glob("*.safetensors"))
        for file in weights:
            with open_shard(file, "np"):
                pass
    except (OSError, ValueError):
        return False
    return bool(weights) and isinstance(state, dict) and state.get("global_step") == step
