"""The configuration of a model that was made smaller alike in all blocks: a plain, smaller model of its class."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...model.inputs import text_part
from .slicing import EXPERT_COUNTS, KEY_HEADS, QUERY_HEADS
from .structure import Structures, tensor_named
from .wholes.blocks import shorter


# What configurations call the width of an MLP.
MLP_WIDTHS = (
    *("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("shared_expert_intermediate_size", "intermediate_size_mlp"),
)
# Where it is true, the width is derived of the setting (LFM2).
_DERIVED = "block_auto_adjust_ff_dim"


def smaller_config(
    model: nn.Module,
    units: Mapping[str, Structures],
    counts: Mapping[str, int],
    gone: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """What the model's configuration says once `counts` structures of every unit are cut out: setting -> value.

    Args:
        gone (`Mapping[str, Sequence[int]]`, *optional*): of units of blocks, which; by default the last.

    Raises:
        ValueError: no configuration of its class says it: blocks differ, or the class derives a width from others.
    """
    alike: dict[tuple[str, int], set[int]] = {}
    for unit, each in units.items():
        alike.setdefault((each.kind, len(each)), set()).add(counts[unit])
    if any(len(numbers) > 1 for numbers in alike.values()):
        kind = next(kind for (kind, _), numbers in alike.items() if len(numbers) > 1)
        raise ValueError(f"Blocks come to differ in their {kind}, and layout='uniform' has one for all.")
    changes: dict[str, Any] = {}
    part, gone = text_part(model.config), gone or {}
    for each in {(each.kind, len(each)): each for each in units.values()}.values():
        count, less = len(each), counts[each.unit]
        queries, keys = (per * (count - less) for per in each.heads)
        if each.kind == "ffn":
            changes |= _width(part, count, count - less)
        elif each.kind == "expert":
            changes |= {name: count - less for name in EXPERT_COUNTS if getattr(part, name, None) == count}
        elif each.kind == "block":
            changes |= shorter(part, count, set(_going(each, less, gone)))
        elif less:
            changes |= _known(part, QUERY_HEADS, each.heads[0] * count, queries)
            changes |= _known(part, KEY_HEADS, each.heads[1] * count, keys)
            size = each.reads[0].index.shape[1] // each.heads[0]
            # Derived of the hidden size and the heads where it is not said; some call another size by that name.
            if "head_dim" in part.to_dict() and part.head_dim in (None, size):
                changes["head_dim"] = size
    _check(model, units, counts, changes, gone)
    return changes


def _going(structures: Structures, count: int, gone: Mapping[str, Sequence[int]]) -> list[int]:
    """Which modules of a unit go: those that are told, or the last that may."""
    able = [number for number in range(len(structures)) if number not in structures.fixed]
    return list(gone.get(structures.unit, able[len(able) - count :]))


def settle(model: nn.Module, changes: Mapping[str, Any]) -> None:
    """Have the model's configuration say what `smaller_config` gave."""
    part = text_part(model.config)
    for name, value in changes.items():
        # The model itself may have noted how many experts there are.
        for module in model.modules() if name in EXPERT_COUNTS else ():
            if vars(module).get("num_experts") == getattr(part, name) and getattr(module, "config", None) is part:
                module.num_experts = value
        setattr(part, name, value)


def unsaid(model: nn.Module, units: Mapping[str, Structures]) -> set[str]:
    """The units of channels whose number no setting of the model's configuration has."""
    part = text_part(model.config)
    return {unit for unit, each in units.items() if each.kind == "ffn" and not _width(part, len(each), len(each) - 1)}


def _width(config: Any, before: int, after: int) -> dict[str, Any]:
    """The settings that say the width of an MLP, with what they become."""
    if getattr(config, _DERIVED, False):
        return {MLP_WIDTHS[0]: after, _DERIVED: False}
    return _known(config, MLP_WIDTHS, before, after)


def _known(config: Any, names: tuple[str, ...], before: int, after: int) -> dict[str, int]:
    """The settings of these `names` that are what they were, or `None` and then derived, with what they become."""
    values = {name: getattr(config, name, before + 1) for name in names if hasattr(config, name)}
    return {name: after for name, value in values.items() if value in (before, None)}


def _check(
    model: nn.Module,
    units: Mapping[str, Structures],
    counts: Mapping[str, int],
    changes: Mapping[str, Any],
    gone: Mapping[str, Sequence[int]],
) -> None:
    """Raise `ValueError` unless a model of the changed configuration has the shapes that will be left."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for unit, each in units.items():
        for cut in each.cuts:
            shapes.setdefault(cut.tensor, list(tensor_named(model, cut.tensor).shape))
            shapes[cut.tensor][cut.axis] -= counts[unit] * cut.index.shape[1]
        if each.wholes:
            shapes = _without(shapes, each.wholes, _going(each, counts[unit], gone))
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(text_part(config), name, value)
    why = "a model of that configuration has other widths"
    try:
        config = type(config).from_dict(config.to_dict())  # as it is loaded, which may check more
        with torch.device("meta"):
            made = type(model)(config)
        tensors = dict(made.named_parameters())
        tensors |= {name: tensor for name, tensor in made.named_buffers() if name in shapes}
        if {name: list(tensor.shape) for name, tensor in tensors.items()} == shapes:
            return
    except Exception as error:  # noqa: BLE001 - a class may refuse numbers in any way
        why = str(error)
    raise ValueError(
        f"{type(model.config).__name__} cannot say what is left ({', '.join(f'{k}={v}' for k, v in changes.items())}: "
        f"{' '.join(why.split())}); cut other structures, or another share; or use layout='per_layer', which "
        "transformers alone does not load."
    )


def _without(shapes: Mapping[str, list[int]], wholes: Sequence[str], gone: Sequence[int]) -> dict[str, list[int]]:
    """Shapes by name, with the modules `gone` out of a list, and the others with new numbers."""
    kept = [number for number in range(len(wholes)) if number not in gone]
    anew = {number: wholes[place] for place, number in enumerate(kept)}
    found = {}
    for name, shape in shapes.items():
        number = next((number for number, whole in enumerate(wholes) if name.startswith(f"{whole}.")), None)
        if number is None:
            found[name] = shape
        elif number in anew:
            found[anew[number] + name.removeprefix(wholes[number])] = shape
    return found
