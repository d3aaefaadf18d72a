"""The plan for a checkpoint: what pruning it will need, found without loading it."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.files import read_json
from ..common.machine import disk_available, memory_available, own_memory, shown_bytes
from ..pruning.allocate import architecture_for
from ..pruning.configuration import DSAConfig
from ..pruning.planning.plan import Plan, plan_for
from ..pruning.planning.shape import ModelShape, shape_of
from ..pruning.planning.tried import distilled_tokens, forward_operations, time_of
from ..pruning.planning.work import WINDOWS, operations, speed, time_block
from .skeleton import open_skeleton, sample_model


logger = logging.getLogger(__name__)

WORD = 1000  # bytes of memory for a word of a tokenizer: 48 MB were measured for 49,152
RANDOM = 1e8  # numbers that a processor makes in a second, for weights of a block that is timed
LONGEST, LONGEST_ALONE = 60, 5  # seconds that timing a block may take, beside weights that are there, and without


def plan(
    path: str | Path,
    config: DSAConfig,
    *,
    dtype: str = "auto",
    device_map: Any = None,
    output: str | Path = ".",
    run_block: bool = True,
    ranks: int = 1,
    devices: int = 1,
    device_memory: int | None = None,
    **options,
) -> Plan:
    """What pruning the model at a path or Hub id by `config` will need; its weights are not read.

    `path` may be a `config.json` alone, or a folder with nothing else in it. Memory is arithmetic on sizes. Time is
    that of one block of the model's sizes, with random weights, pruned on one or two windows, and extrapolated.

    Args:
        dtype (`str`, defaults to `"auto"`): as for [`DSAPruner.from_pretrained`].
        device_map (`Any`, *optional*): as for it.
        output (`str`, defaults to the working folder): where the result will go.
        run_block (`bool`, defaults to `True`): whether a block is run; otherwise time is arithmetic, too: a product is
            timed, and operations are counted. So it is where a block takes too long here to be run.
        ranks (`int`, defaults to 1): processes that the calibration text is divided over; on a CPU they share memory.
        devices (`int`, defaults to 1): GPUs that each of them spreads the model over.
        device_memory (`int`, *optional*): bytes of each device, where they are not those of this machine: nothing here
            is counted, and no time is told.
        options (`dict`): of `from_pretrained`; those that say where the checkpoint is are used (`revision`, ...).

    Raises:
        ValueError: the checkpoint cannot be a model's, or the config does not fit it.
        OSError: there is no checkpoint.
    """
    if ranks < 1 or devices < 1:
        raise ValueError(f"ranks and devices are whole numbers of at least 1; got {ranks} and {devices}.")
    if Path(path).suffix == ".json" and Path(path).is_file():
        _check_config(Path(path))
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder, "config.json"))
            spread = {"ranks": ranks, "devices": devices, "device_memory": device_memory}
            asked = {"dtype": dtype, "device_map": device_map, "output": output, "run_block": run_block}
            return plan(folder, config, **asked, **spread, **options)
    model, dtype = open_skeleton(path, dtype, **options)
    architecture = architecture_for(model, config)
    shape = shape_of(model, architecture, dtype)
    # Only now: the model's class has brought its libraries in, as it will when it is loaded.
    libraries = own_memory() + _tokenizer(path, model)
    device, offloaded = _place(device_map)
    config.reconstruct.check_place(offloaded)
    here = _elsewhere(device_memory) if device_memory is not None else _here(device, ranks, output, libraries)
    asked: dict[str, Any] = {"offloaded": offloaded, "ranks": ranks, "devices": devices, **here}
    found = plan_for(shape, config, **asked)
    if device_map == "auto" and not found.memory_fits and config.reconstruct.is_by_block:
        found = plan_for(shape, config, **asked | {"offloaded": True})
    if device_memory is not None:
        return found
    needed = found.total - found.phases["loading"]["weights"]
    seconds = None
    own, single = speed(device, dtype), speed(device, torch.float32)
    judged = forward_operations(shape, found.tries.tokens) / own if found.tries else 0.0
    whole = forward_operations(shape, distilled_tokens(config, found.text.samples, found.text.length)) / own
    trial = _trial(shape, config, found, own, single)
    if run_block and needed <= found.available and trial <= (LONGEST if _has_weights(path) else LONGEST_ALONE):
        seconds = _run(path, config, found, shape, dtype, options, judged)
    if seconds is not None:
        return replace(found, seconds=_divided(seconds, shape, ranks) + whole, timed=True)

    def counted(config: DSAConfig) -> float:
        forward, rest = operations(shape, config, found.text)
        return forward / own + rest / single

    seconds = time_of(config, found.tries, counted, judged)
    return replace(found, seconds=_divided(seconds, shape, ranks) + whole)


def _check_config(path: Path) -> None:
    """Raise `ValueError` where a file is no configuration of a model, by its own name: what is read is a copy."""
    stated = read_json(path)
    if not isinstance(stated, dict) or "model_type" not in stated:
        raise ValueError(f"{path} says no model_type, so it is no model's config.json; name that, or its folder.")


def _divided(seconds: float, shape: ModelShape, ranks: int) -> float:
    """What so many processes take: samples and matrices are divided, and of both a block has so many."""
    return seconds / min(ranks, max(len(block.weights) for block in shape.blocks))


def _here(device: str, ranks: int, output: str | Path, libraries: int) -> dict[str, Any]:
    """What `plan_for` is to know of this machine, on which so many processes run, each with its `libraries`."""
    on_cpu = torch.device(device).type == "cpu"
    available = memory_available(device) // ranks + own_memory() if on_cpu else memory_available(device)
    found = {"libraries": libraries if on_cpu else 0, "disk_available": disk_available(output)}
    return {"device": device, "available": available, **found}


def _elsewhere(memory: int) -> dict[str, Any]:
    """The same of a device that is not here, of which that alone is known."""
    return {"device": f"a device of {shown_bytes(memory)}", "available": memory}


def _has_weights(path: str | Path) -> bool:
    return any(Path(path).glob("*.safetensors"))


def _trial(shape: ModelShape, config: DSAConfig, found: Plan, own: float, single: float) -> float:
    """Seconds that `_run` would take, by arithmetic: two blocks are made, and pruned on as many windows."""
    two = replace(shape, blocks=shape.blocks[:2])
    forward, rest = operations(two, config, replace(found.text, samples=min(WINDOWS, found.text.samples)))
    return forward / own + rest / single + sum(block.parameters for block in two.blocks) / RANDOM


def _tokenizer(path: str | Path, model: nn.Module) -> int:
    """Bytes that the tokenizer beside a model takes; 0 where a folder has none."""
    if Path(path).is_dir() and not Path(path, "tokenizer.json").is_file():
        return 0
    return WORD * (getattr(model.config.get_text_config(), "vocab_size", None) or 0)


def _place(device_map: Any) -> tuple[str, bool]:
    """The device that computes, and whether weights are on the disk."""
    if device_map is None:
        return "cpu", False
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu", False
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    devices = sorted(str(place) for place in places if str(place) not in ("cpu", "disk"))
    first = devices[0] if devices else "cpu"
    return f"cuda:{first}" if first.isdigit() else first, "disk" in places


def _run(
    path: str | Path,
    config: DSAConfig,
    found: Plan,
    shape: ModelShape,
    dtype: torch.dtype,
    options: dict[str, Any],
    judged: float,
) -> float | None:
    """Seconds, from a block that is run; `None` where it cannot be made alone.

    `judged`: seconds of a forward pass by which allocations that are tried are judged.
    """

    def timed(config: DSAConfig) -> float:
        model = sample_model(path, dtype, found.device, **options)
        return time_block(model, config, found.text).total(shape, found.text)

    try:
        return time_of(config, found.tries, timed, judged)
    except Exception as error:  # noqa: BLE001 - whatever a model's class does with a changed configuration
        why = " ".join(str(error).split()) or type(error).__name__
        logger.warning("No block of %s could be run alone (%s): the time is from arithmetic.", path, why)
        return None
