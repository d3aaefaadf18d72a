"""The parameters that are a model's own: shared ones once, also where they are elsewhere, and without adapters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..common.fences import tied_names
from .adapters import adapter_parameters, plain_name


def one_name_each(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter of `model` itself -> the name that stands for it; without what adapters brought.

    A parameter with several names has one that stands for all. In memory it is one object; where accelerate keeps the
    weights elsewhere, each name has a placeholder of its own, and only the model's list of ties tells that they are
    one.
    """
    source_of, adapters = tied_names(model), adapter_parameters(model)
    found: dict[str, str] = {}
    by_object: dict[int, str] = {}
    by_tie: dict[str, tuple[str, bool]] = {}  # what others are tied to -> its first name, and whether it is elsewhere
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in adapters:
            continue
        source = source_of.get(plain_name(name), plain_name(name))
        # PEFT puts ".base_layer" into names, and the list of ties has them without.
        first, elsewhere = by_tie.setdefault(source, (name, parameter.is_meta))
        # two objects that are here and not one have been parted, whatever the list says
        one = first if elsewhere or parameter.is_meta else name
        found[name] = by_object.setdefault(id(parameter), one)
    return found


def own_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter of `model` itself: a shared one once, none that adapters brought; any shape."""
    for name in dict.fromkeys(one_name_each(model).values()):
        yield name, model.get_parameter(name)


def count_parameters(model: nn.Module) -> int:
    """How many parameters `model` has: as many with its weights on disk, or with adapters, as in memory without."""
    return sum(parameter.numel() for _, parameter in own_parameters(model))


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights take in a file, about."""
    return sum(parameter.numel() * parameter.element_size() for _, parameter in own_parameters(model))
