"""What keeps a model from being cut, said before any work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...model.adapters import has_adapters
from ...model.architecture import Architecture
from ...model.offload import is_offloaded
from ..zeros import FEWEST_ZEROS
from .configuration import DSAStructuredConfig
from .structure import WHOLE, Structures


def check_cuttable(model: nn.Module) -> None:
    """Raise `ValueError` for what is no transformers model in memory, without adapters."""
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
        raise ValueError(
            "Structures are cut in memory, and some of the model's weights are elsewhere (offloaded); load it without "
            "a device_map, or with one of devices alone."
        )


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
        zero = model.get_parameter(cut.tensor).data == 0
        zeros += int((zero & ~zero.all(1 - cut.axis, keepdim=True)).sum())
        size += zero.numel()
    if size and zeros >= FEWEST_ZEROS * size:
        raise ValueError(
            f"{zeros / size:.2%} of the matrices that update='refit' fits are zero, and it would fill them; cut "
            "first and prune weights then, or use update='none' or 'bias', which leave zeros alone."
        )
