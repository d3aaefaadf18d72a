"""The plan for a checkpoint: what pruning it will need, found without loading it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.machine import disk_available, memory_available, own_memory
from ..pruning.allocate import architecture_for
from ..pruning.configuration import DSAConfig
from ..pruning.planning.plan import Plan, plan_for
from ..pruning.planning.shape import ModelShape, shape_of
from ..pruning.planning.tried import distilled_tokens, forward_operations, time_of
from ..pruning.planning.work import operations, speed, time_block
from .skeleton import open_skeleton, sample_model


logger = logging.getLogger(__name__)

WORD = 1000  # bytes of memory for a word of a tokenizer: 48 MB were measured for 49,152


def plan(
    path: str | Path,
    config: DSAConfig,
    *,
    dtype: str = "auto",
    device_map: Any = None,
    output: str | Path = ".",
    run_block: bool = True,
    **options,
) -> Plan:
    """What pruning the model at a path or Hub id by `config` will need; its weights are not read.

    Memory is arithmetic on sizes. Time is that of one block of the model's sizes, with random weights, pruned on one
    or two windows; the rest is extrapolated.

    Args:
        dtype (`str`, defaults to `"auto"`): as for [`DSAPruner.from_pretrained`].
        device_map (`Any`, *optional*): as for it.
        output (`str`, defaults to the working folder): where the result will go.
        run_block (`bool`, defaults to `True`): whether a block is run; otherwise time is arithmetic, too: a product is
            timed, and operations are counted.
        options (`dict`): of `from_pretrained`; those that say where the checkpoint is are used (`revision`, ...).

    Raises:
        ValueError: the checkpoint cannot be a model's, or the config does not fit it.
        OSError: there is no checkpoint.
    """
    model, dtype = open_skeleton(path, dtype, **options)
    architecture = architecture_for(model, config)
    shape = shape_of(model, architecture, dtype)
    # Only now: the model's class has brought its libraries in, as it will when it is loaded.
    libraries = own_memory() + _tokenizer(path, model)
    device, offloaded = _place(device_map)
    config.reconstruct.check_place(offloaded)
    on_cpu = torch.device(device).type == "cpu"
    asked: dict[str, Any] = {
        "device": device,
        "offloaded": offloaded,
        "libraries": libraries if on_cpu else 0,
        "available": memory_available(device) + (own_memory() if on_cpu else 0),
        "disk_available": disk_available(output),
    }
    found = plan_for(shape, config, **asked)
    if device_map == "auto" and not found.memory_fits and config.reconstruct.is_by_block:
        found = plan_for(shape, config, **asked | {"offloaded": True})
    needed = found.total - found.phases["loading"]["weights"]
    seconds = None
    own, single = speed(device, dtype), speed(device, torch.float32)
    judged = forward_operations(shape, found.tries.tokens) / own if found.tries else 0.0
    whole = forward_operations(shape, distilled_tokens(config, found.text.samples, found.text.length)) / own
    if run_block and needed <= found.available:
        seconds = _run(path, config, found, shape, dtype, options, judged)
    if seconds is not None:
        return replace(found, seconds=seconds + whole, timed=True)

    def counted(config: DSAConfig) -> float:
        forward, rest = operations(shape, config, found.text)
        return forward / own + rest / single

    return replace(found, seconds=time_of(config, found.tries, counted, judged) + whole)


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
