"""Biases for matrices that have none, where the configuration of a model's class has a switch for them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ...model.inputs import text_part
from ...model.offload import is_offloaded
from ...model.parameters import own_parameters
from .structure import Structures


@dataclass(frozen=True)
class Biases:
    """What a model would have with some switches on.

    Attributes:
        switches: settings of its configuration that are off.
        sizes: full name of each bias -> how many numbers it has.
    """

    switches: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


def biases_for(model: nn.Module, units: Mapping[str, Structures]) -> Biases:
    """The biases that what reads structures lacks, and those that come with them: `mlp_bias` is of three matrices.

    Raises:
        ValueError: no switch of its configuration gives one of them.
    """
    readers = {cut.tensor.rpartition(".")[0] for each in units.values() for cut in each.reads}
    lacking = sorted(f"{name}.bias" for name in readers if getattr(model.get_submodule(name), "bias", None) is None)
    switches, sizes = [], {}
    for switch in _switches(model) if lacking else ():
        added = _with(model, switch)
        if set(added) & set(lacking):
            switches.append(switch)
            sizes |= added
    if switches and is_offloaded(model):
        raise ValueError(
            f"update='bias' gives matrices biases ({', '.join(switches)}), and some of the model's weights are "
            "elsewhere (offloaded), with no place for more; use update='refit', or load it without device_map."
        )
    if without := [name.removesuffix(".bias") for name in lacking if name not in sizes]:
        raise ValueError(
            f"update='bias' adds to the bias of what reads a structure; {without[0]} has none (nor have "
            f"{len(without) - 1} others), and {type(model.config).__name__} no switch for one; use update='refit'."
        )
    return Biases(tuple(switches), sizes)


@contextmanager
def given(model: nn.Module, biases: Biases) -> Iterator[None]:
    """Give the model these biases, zeros, in place, with which it computes what it did; take them back on an error."""
    _give(model, biases)
    try:
        yield
    except BaseException:
        _take_back(model, biases)
        raise


@contextmanager
def lent(model: nn.Module, biases: Biases) -> Iterator[None]:
    """As `given`, and taken back at the end whatever happens."""
    _give(model, biases)
    try:
        yield
    finally:
        _take_back(model, biases)


def _give(model: nn.Module, biases: Biases) -> None:
    for name, size in biases.sizes.items():
        module = model.get_submodule(name.rpartition(".")[0])
        module.register_parameter("bias", nn.Parameter(module.weight.new_zeros(size)))
    _switch(model, biases, True)


def _take_back(model: nn.Module, biases: Biases) -> None:
    for name in biases.sizes:
        model.get_submodule(name.rpartition(".")[0]).register_parameter("bias", None)
    _switch(model, biases, False)


def _switch(model: nn.Module, biases: Biases, on: bool) -> None:
    part = text_part(model.config)
    for switch in biases.switches:
        setattr(part, switch, on)


def _switches(model: nn.Module) -> list[str]:
    """Settings that are off and speak of biases, such as `mlp_bias` and `attention_bias`."""
    settings = text_part(model.config).to_dict()
    return [name for name, value in settings.items() if "bias" in name and value is False]


def _with(model: nn.Module, switch: str) -> dict[str, int]:
    """The parameters, all of them biases, that a model of this class has beyond this one with a switch on, by size."""
    config = copy.deepcopy(model.config)
    setattr(text_part(config), switch, True)
    try:
        with torch.device("meta"):
            made = dict(own_parameters(type(model)(config)))
    except Exception:  # noqa: BLE001 - a class may refuse a setting in any way
        return {}
    known: Collection[str] = dict(own_parameters(model))
    added = {name: value for name, value in made.items() if name not in known}
    if len(made) - len(added) != len(known) or not all(_is_bias(model, *each) for each in added.items()):
        return {}
    return {name: value.numel() for name, value in added.items()}


def _is_bias(model: nn.Module, name: str, value: nn.Parameter) -> bool:
    owner, _, attribute = name.rpartition(".")
    return attribute == "bias" and value.dim() == 1 and isinstance(model.get_submodule(owner), nn.Linear)
