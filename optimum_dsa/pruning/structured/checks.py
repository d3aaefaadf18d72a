"""What keeps a model from being cut, said before any work."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ...model.adapters import has_adapters
from ...model.architecture import Architecture
from ...model.offload import is_offloaded, resident
from ..zeros import FEWEST_ZEROS
from .configuration import DSAStructuredConfig
from .importance import CHANNELS, IMPORTANCES, importance_of
from .structure import ENTIRE, WHOLE, Structures


logger = logging.getLogger(__name__)


def check_cuttable(model: nn.Module, config: DSAStructuredConfig) -> None:
    """Raise `ValueError` for what is no transformers model without adapters, or not in memory where it has to be."""
    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        raise ValueError(
            f"Structures are cut out of a transformers model, and {type(model).__name__} is none: it has no config; "
            "load one with from_pretrained."
        )
    if has_adapters(model):
        raise ValueError(
            "The model has adapters, whose sizes are those of the model as it is; merge them "
            "(model.merge_and_unload()) or remove them, and cut then."
        )
    if is_offloaded(model):
        config.reconstruct.check_place(offloaded=True)
        check_by_block(config)


def check_by_block(config: DSAStructuredConfig) -> None:
    """Raise `ValueError` where what is asked for needs all weights of a model at once: some are elsewhere."""
    rows = [importance_of(kind, config.importance) for kind in config.structures]
    gradients = any(IMPORTANCES.fact(row, "gradients") for row in rows)
    needs = {
        f"learner={config.learner!r} trains": config.learner is not None,
        f"importance={config.importance!r} takes gradients of": gradients,
        f"structures={list(config.structures)} tries blocks without a part of them, in": bool(
            set(ENTIRE) & set(config.structures)
        ),
        f"max_loss={config.max_loss!r} changes and puts back": config.max_loss is not None,
        "allocation='fisher' takes gradients of": config.allocation == "fisher",
        "allocation='milp' changes and puts back": config.allocation == "milp",
        "cost='latency' is timed where the weights are, of": "latency" in (config.cost, *config.least),
    }
    if trouble := next((what for what, needed in needs.items() if needed), None):
        raise ValueError(
            f"{trouble} the whole model, and some of its weights are elsewhere (offloaded); load it without "
            "device_map, or with one of devices alone, or leave that out."
        )


def keeps_blocks(config: DSAStructuredConfig) -> bool:
    """Whether a cut walks the blocks once, and can keep those that are finished."""
    return config.learner is None and config.max_loss is None and not set(config.structures) <= set(WHOLE)


def check_resumable(config: DSAStructuredConfig, checkpoints: str | Path | None, resume: bool) -> None:
    """Raise `ValueError` where a cut keeps nothing to go on from, or is not told where."""
    if not (resume or checkpoints is not None):
        return
    if config.learner is None and not keeps_blocks(config):
        given = "resume=True" if resume else f"checkpoints={str(checkpoints)!r}"
        what = (
            f"max_loss={config.max_loss!r} tries cuts one after the other"
            if config.max_loss is not None
            else f"structures={list(config.structures)} goes at once"
        )
        raise ValueError(
            f"{what}, without finished blocks to keep, and {given} asks for them; leave it out, and run it again "
            "where it was interrupted."
        )
    if resume and checkpoints is None:
        raise ValueError("Resuming needs the folder of checkpoints; name it.")


def check_found(
    model: nn.Module,
    found: Mapping[str, Structures],
    units: Mapping[str, Structures],
    left: Mapping[str, str],
    config: DSAStructuredConfig,
) -> None:
    """Raise `ValueError` where of what was `found` nothing is among the `units` that can be cut; warn of a kind."""
    channels = [each for each in units.values() if each.kind == "ffn"]
    if channels and config.round_to >= max(2, *map(len, channels)):
        widest = max(channels, key=len)
        raise ValueError(
            f"round_to={config.round_to} keeps multiples of it, and {widest.unit} has {len(widest)} channels: none "
            f"can go; use a number below {len(widest)}."
        )
    able = [each for each in units.values() if len(each) > each.least or not each.entire]
    missing = [kind for kind in config.structures if all(each.goes_as != kind for each in able)]
    if not missing:
        return
    others = sorted({each.goes_as for each in found.values()} - set(config.structures))
    hint = f" It has {' and '.join(map(repr, others))}." if others else ""
    if tied := next((each.goes_as for each in found.values() if each.tied and each.goes_as in missing), None):
        hint = f" Of {tied!r} as many go in all blocks, with layout='uniform'."
    said = f"{type(model).__name__} has no {' or '.join(missing)} that could be cut out"
    if able:
        logger.warning("%s.%s", said, hint)
        return
    why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
    raise ValueError(f"{said}{f' ({why})' if why else ''}.{hint}")


def check_excluded(architecture: Architecture, units: Mapping[str, Structures], config: DSAStructuredConfig) -> None:
    """Raise `ValueError` where `exclude` keeps a kind whole in some blocks, and all are to stay alike."""
    if config.layout != "uniform" or not config.exclude:
        return
    touched = [
        block.name
        for block in architecture.blocks
        if any(why == "excluded" and name.startswith(f"{block.name}.") for name, why in architecture.dense.items())
    ]
    for kind in dict.fromkeys(each.kind for each in units.values() if each.kind != "block"):
        blocks = {each.block for each in units.values() if each.kind == kind}
        if whole := [name for name in touched if name not in blocks]:
            raise ValueError(
                f"exclude={list(config.exclude)} keeps the {kind} of {whole[0]} whole"
                f"{f' (and of {len(whole) - 1} more blocks)' if len(whole) > 1 else ''}, and layout='uniform' has one "
                "width for all blocks; exclude these matrices in every block, cut other structures, or use "
                "layout='per_layer'."
            )


@torch.no_grad()
def check_zeros(model: nn.Module, units: Mapping[str, Structures], config: DSAStructuredConfig) -> None:
    """Raise `ValueError` where a refit would fill zeros that pruning made; columns of nothing but zeros are none."""
    if config.update != "refit":
        return
    zeros = size = 0
    for cut in (cut for each in units.values() if each.kind not in WHOLE for cut in each.reads):
        with resident(model, [cut.tensor.rpartition(".")[0]]):
            zero = model.get_parameter(cut.tensor).data == 0
        zeros += int((zero & ~zero.all(1 - cut.axis, keepdim=True)).sum())
        size += zero.numel()
    if size and zeros >= FEWEST_ZEROS * size:
        raise ValueError(
            f"{zeros / size:.2%} of the matrices that update='refit' fits are zero, and it would fill them; cut "
            "first and prune weights then, or use update='none' or 'bias', which leave zeros alone."
        )


def say_incomparable(config: DSAStructuredConfig) -> None:
    """Warn where one order of all blocks is made of importances that look at each by itself."""
    by_itself = config.importance != "random" and not IMPORTANCES.fact(config.importance, "gradients")
    if config.allocation == "global" and by_itself and set(config.structures) & set(CHANNELS):
        logger.warning(
            "allocation='global' sets what importance=%r says of one block beside what it says of others, and it "
            "looks at each block by itself; allocation='fisher' or 'milp', or an importance that reads gradients, "
            "such as 'taylor', have a scale that all blocks share.",
            config.importance,
        )
