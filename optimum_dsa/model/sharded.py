"""Weights that several processes hold in shares (DTensor, as FSDP2 makes them): a share, the whole, and back."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..common.fences import class_before_sharding, parts_of


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a share of a parameter of `model`, and other processes the rest."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """The share of this process, of its own shape: a view that writes through; an ordinary tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of the shape that it says; of a shared one a copy, for which every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def shared_like(full: Tensor, tensor: Tensor) -> Tensor:
    """`full` divided as `tensor` is, of its shape and in its own dtype; as it is beside an ordinary tensor.

    Every process has `full`, and takes its share without asking another.
    """
    if not hasattr(tensor, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(local(tensor).device)
    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)


def twin(model: nn.Module, gathered: bool = False) -> nn.Module:
    """A model like `model` whose modules are objects of their own and whose parameters are the very same.

    What FSDP does to the twin (shares in the place of parameters, hooks, classes) `model` does not see. A `forward`
    that was put upon a module stays behind.

    Args:
        gathered (`bool`): of a sharded model, the twin is an ordinary one with whole parameters and without hooks:
            each process holds all of it then, and every one has to ask.
    """
    modules: dict[int, nn.Module] = {}
    parameters: dict[int, nn.Parameter] = {}

    def of_parameter(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not gathered or not hasattr(parameter, "full_tensor"):
            return parameter
        if id(parameter) not in parameters:  # tied ones stay tied
            parameters[id(parameter)] = nn.Parameter(whole(parameter).clone(), parameter.requires_grad)
        return parameters[id(parameter)]

    def of_module(module: nn.Module | None) -> nn.Module | None:
        if module is None:
            return None
        if id(module) in modules:
            return modules[id(module)]
        kind = class_before_sharding(module)
        modules[id(module)] = made = kind.__new__(kind)
        # A method that somebody set on the object is bound to the old one.
        state = {name: value for name, value in vars(module).items() if not _covers_a_method(kind, name, value)}
        made.__dict__.update(state)
        for name, hooks in state.items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                # Those of FSDP belong to the shares; what else is hooked on goes along.
                made.__dict__[name] = OrderedDict() if gathered else OrderedDict(hooks)
        for own in parts_of(made):  # still those of the module
            made.__dict__.update({name: dict(own) for name, known in state.items() if known is own})
        own, _, inner = parts_of(made)
        own.update({name: of_parameter(value) for name, value in own.items()})
        inner.update({name: of_module(value) for name, value in inner.items()})
        return made

    reshard(model)
    return of_module(model)


def _covers_a_method(kind: type, name: str, value: object) -> bool:
    return callable(value) and callable(getattr(kind, name, None)) and not isinstance(value, nn.Module)


def reshard(model: nn.Module) -> None:
    """Have the shares of `model` in the place of its parameters, whose whole values a forward pass may leave there.

    What is written into those is lost.
    """
    for module in model.modules():
        if class_before_sharding(module) is not type(module):
            module.reshard()


@torch.no_grad()
def copy_into(model: nn.Module, source: nn.Module) -> None:
    """Give the parameters of `model` the values of those of `source`, in place; either may be sharded, any shapes.

    Where one is, every process has to ask.
    """
    reshard(model), reshard(source)
    values = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        value = values[name]
        if hasattr(parameter, "full_tensor"):
            local(parameter.data).copy_(local(shared_like(value.data, parameter)))
        else:
            parameter.data.copy_(whole(value.data))
