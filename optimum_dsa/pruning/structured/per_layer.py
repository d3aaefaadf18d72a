"""Models whose layers differ: what their configurations say, and the class for it (`model/modeling_per_layer.py`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from ...model import modeling_per_layer as made
from ...model.inputs import text_part
from ...model.modeling_per_layer import KEY_HEADS, QUERY_HEADS
from ...model.parameters import own_parameters
from ...model.per_layer import classes_of, known_family
from .structure import Structures, tensor_named


# What configurations call the width of an MLP.
MLP_WIDTHS = (
    *("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("shared_expert_intermediate_size", "intermediate_size_mlp"),
)
# Where it is true, the width is derived of the setting (LFM2).
_DERIVED = "block_auto_adjust_ff_dim"


class _Unsayable(ValueError):
    """No configuration of layers that differ says what would be left."""


def per_layer(
    model: nn.Module, units: Mapping[str, Structures], counts: Mapping[str, int]
) -> Callable[[nn.Module], None]:
    """What has a model, once `counts` structures of each unit are cut out, be of a class whose layers may differ.

    Raises:
        ValueError: there is no such class for its family, or none that says what is left.
    """
    try:
        say = _said(model, units, counts)
        config, kind = copy.deepcopy(model.config), _class(model)
        say(config)
        if (trouble := why_not(kind, config, model, units, counts)) is not None:
            raise _Unsayable(trouble)
    except _Unsayable as error:
        alike = "" if any(each.entire for each in units.values()) else ", or layout='uniform'"
        raise ValueError(
            f"{type(model).__name__} has no class whose layers may differ ({error}); use layout='padded', which keeps "
            f"its class and fills up with zeros{alike}."
        ) from None

    def settle(model: nn.Module) -> None:
        made.own_settings(model, model.config)
        say(model.config)
        layers = enumerate(made.list_of_layers(model, model.config.per_layer_blocks))
        if kept := {number: list(rows[1]) for number, layer in layers if (rows := made.rows_of(layer))}:
            model.config.per_layer_heads = kept
        model.__class__ = kind

    return settle


def known(config: Any, names: tuple[str, ...], number: int) -> list[str]:
    """Those of some settings, by the names they are stored under, that are `number`, or `None` and then derived."""
    alias = getattr(config, "attribute_map", {})
    stored = dict.fromkeys(alias.get(name, name) for name in names if hasattr(config, name))
    return [name for name in stored if getattr(config, name) in (number, None)]


def width(config: Any, before: int, after: int) -> dict[str, Any]:
    """The settings that say the width of an MLP, with what they become."""
    if getattr(config, _DERIVED, False):
        return {MLP_WIDTHS[0]: after, _DERIVED: False}
    return dict.fromkeys(known(config, MLP_WIDTHS, before), after)


def why_not(
    kind: type,
    config: Any,
    model: nn.Module,
    units: Mapping[str, Structures],
    counts: Mapping[str, int],
    gone: Mapping[str, Sequence[int]] | None = None,
) -> str | None:
    """Why a model of this class and configuration is not of the shapes that will be left, or `None` where it is."""
    shapes = {name: list(parameter.shape) for name, parameter in own_parameters(model)}
    for unit, each in units.items():
        for cut in each.cuts:
            shapes.setdefault(cut.tensor, list(tensor_named(model, cut.tensor).shape))
            shapes[cut.tensor][cut.axis] -= counts[unit] * cut.index.shape[1]
        if each.wholes:
            shapes = _without(shapes, each.wholes, going(each, counts[unit], gone or {}))
    try:
        config = type(config).from_dict(config.to_dict())  # as it is loaded, which may check more
        with torch.device("meta"):
            found = kind(config)
    except Exception as error:  # noqa: BLE001 - a class may refuse numbers in any way
        return " ".join(str(error).split())
    tensors = dict(own_parameters(found))
    tensors |= {name: tensor for name, tensor in found.named_buffers() if name in shapes}
    if {name: list(tensor.shape) for name, tensor in tensors.items()} == shapes:
        return None
    return "a model of that configuration has other widths"


def going(structures: Structures, count: int, gone: Mapping[str, Sequence[int]]) -> list[int]:
    """Which modules of a unit go: those that are told, or the last that may."""
    able = [number for number in range(len(structures)) if number not in structures.fixed]
    return list(gone.get(structures.unit, able[len(able) - count :]))


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


def _class(model: nn.Module) -> type:
    """The class for layers that differ of a model's class; `_Unsayable` where it has none."""
    name, config = type(model).__name__, model.config
    if isinstance(model, made.PerLayerModel):
        return type(model)
    if getattr(transformers, name, None) is not type(model):
        raise _Unsayable("its code is not transformers' own")
    if text_part(config) is not config or getattr(config, "is_encoder_decoder", False):
        raise _Unsayable("it is made of several models")
    if getattr(transformers, type(config).__name__, None) is not type(config):
        raise _Unsayable(f"{type(config).__name__} is not transformers' own")
    known_family(config.model_type)
    return made.class_named(made.PREFIX + name)


def _said(model: nn.Module, units: Mapping[str, Structures], counts: Mapping[str, int]) -> Callable[[Any], None]:
    """What has a configuration say what is left: configuration -> nothing."""
    kind, config = _class(model).config_class, model.config
    if any(
        each.wholes or any(not isinstance(tensor_named(model, cut.tensor), nn.Parameter) for cut in each.cuts)
        for each in units.values()
    ):
        raise _Unsayable("its experts are modules of their own, or count what no parameter holds")
    paths = {each.block.rpartition(".")[0] for each in units.values()}
    numbers = {each.block.rpartition(".")[2] for each in units.values()}
    if len(paths) > 1 or not all(number.isdecimal() for number in numbers):
        raise _Unsayable("its blocks do not stand in one list")
    tensors: dict[str, tuple[str, int, int]] = dict(getattr(config, "per_layer_tensors", {}))
    widths: dict[int, dict[str, int]] = {}
    before: dict[str, int] = {}
    for unit, each in units.items():
        number = int(each.block.rpartition(".")[2])
        own = widths.setdefault(number, {})
        settings = _settings(config.per_layer_config[number], each)
        for name, (count, each_less) in settings.items():
            if own.setdefault(name, count - counts[unit] * each_less) != count - counts[unit] * each_less:
                raise _Unsayable(f"{each.block} has two kinds that {name} counts")
            before[name] = max(count, before.get(name, 0))
        name = next(iter(settings))
        for cut in each.cuts:
            row = (name, cut.index.shape[1], cut.axis)
            if tuple(tensors.setdefault(each.within(cut.tensor), row)) != row:
                raise _Unsayable(f"its blocks differ in how they make {each.within(cut.tensor)}")
    heads = {each.head_size for each in units.values() if each.heads != (0, 0)}
    family, path = config.model_type.removeprefix(made.TYPE), paths.pop()
    absent = _left_out(config, units)

    def say(config: Any) -> None:
        earlier = made.widths_of(config)
        config.per_layer_config = None
        config.__class__ = kind
        for name, value in before.items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
        if len(heads) == 1 and getattr(config, "head_dim", None) is None:
            config.head_dim = next(iter(heads))  # nobody may derive it of a layer's own number of heads
        config.per_layer_blocks = path
        config.per_layer_tensors = {name: list(row) for name, row in tensors.items()}
        if absent:
            config.per_layer_absent = absent
        classes = {"AutoConfig": kind.__name__} | classes_of(family)
        config.auto_map = {auto: f"{made.__name__.rpartition('.')[2]}.{name}" for auto, name in classes.items()}
        config.per_layer_config = {
            number: earlier.get(number, {}) | own for number, own in (dict.fromkeys(earlier, {}) | widths).items()
        }

    return say


def _left_out(config: Any, units: Mapping[str, Structures]) -> dict[str, list]:
    """The setting that is 0 where a part of a layer is left out -> what `leave_out` is told of it."""
    found = dict(getattr(config, "per_layer_absent", None) or {})
    for each in units.values():
        if each.absent:
            number = int(each.block.rpartition(".")[2])
            name = next(iter(_settings(config.per_layer_config[number], each)))
            if found.setdefault(name, list(each.absent)) != list(each.absent):
                raise _Unsayable(f"its blocks differ in what runs without {name}")
    return found


def _settings(own: Any, each: Structures) -> dict[str, tuple[int, int]]:
    """The settings of a layer that count its structures -> what they are, and by how much one structure lowers them.

    The first is by which its tensors are counted.
    """
    count = len(each)
    if each.kind == "ffn":
        names = known(own, MLP_WIDTHS, count)
        if not names:
            # No setting of its family says it (BLOOM: four times the hidden size), so one is made.
            names = [each.within(each.reads[0].tensor).rpartition(".")[0].replace(".", "_") + "_width"]
        return dict.fromkeys(names, (count, 1))
    if each.kind == "expert":
        names = [name for name in made.EXPERT_COUNTS if getattr(own, name, None) == count]
        if not names:
            raise _Unsayable("no setting counts its experts")
        return dict.fromkeys(names, (count, 1))
    queries, keys = each.heads
    found = dict.fromkeys(known(own, QUERY_HEADS, queries * count), (queries * count, queries))
    of_keys = dict.fromkeys(known(own, KEY_HEADS, keys * count), (keys * count, keys)) if keys else {}
    found = of_keys | found if queries > 1 else found | of_keys
    if not found or (queries > 1 and not of_keys):
        raise _Unsayable(f"no setting counts its {each.kind}s")
    return found
