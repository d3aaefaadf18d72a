"""The Trainer's checkpoints that a recovery goes on from, and of which run they are."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint.shards import open_shard
from ..common.files import read_json, write_text
from ..common.same_run import FINGERPRINTS, check_same_run
from ..common.settings import flattened
from ..model.fingerprint import fingerprint_of_model, fingerprint_of_tensors
from ..pruning.report import PruningReport
from .configuration import RecoveryConfig


logger = logging.getLogger(__name__)

RUN = "dsa_run.json"  # beside the checkpoints: what they were made with
# Settings that change no weight on the way to the end.
FREE = ("gradient_checkpointing", "merge", "save_steps", "sharding")


def settings_of(
    model: nn.Module,
    texts: Mapping[str, Tensor],
    teacher: nn.Module | None,
    config: RecoveryConfig,
    report: PruningReport,
) -> dict[str, Any]:
    """All that decides what a recovery makes of a model, as JSON values; to be called before it is changed.

    `texts` are the windows of each rôle, (samples, length).
    """
    prints = {"model": fingerprint_of_model(model), "text": fingerprint_of_tensors(texts)}
    if teacher is not None:
        prints["teacher"] = fingerprint_of_model(teacher)
    settings = flattened(RecoveryConfig, config.to_dict())
    return {
        **{name: value for name, value in settings.items() if name not in FREE},
        "budget": dict(report.allocation.counts()),
        FINGERPRINTS: prints,
    }


def begin(folder: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Write down what a run is, or with `resume` see that the one in `folder` is the same.

    Raises:
        ValueError: the checkpoints there are of another run, or nothing says of which.
    """
    path, way_out = folder / RUN, f"remove {folder} to begin anew"
    settings = json.loads(json.dumps(settings))
    if resume and any(map(_step, folder.glob("checkpoint-*"))):
        known = read_json(path) if path.exists() else {}
        if not isinstance(known, Mapping) or not known:
            raise ValueError(f"{folder} does not say with what its checkpoints were made ({RUN}); {way_out}.")
        check_same_run(f"The recovery in {folder}", known, settings, way_out)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings) + "\n")


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
