"""PEFT adapters in a model: recognised, so that what they brought is never taken for a weight of the model itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..common.fences import has_attached_adapters


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT adapters are in `model`: around it, attached to it by transformers, or put into its layers."""
    return bool(getattr(model, "peft_config", None)) or any(True for _ in _tuners(model))


def saves_adapters(model: nn.Module) -> bool:
    """Whether saving `model` writes its adapters; those that somebody put into its layers, he has to save himself."""
    return has_adapters(model) and (hasattr(model, "get_base_model") or has_attached_adapters(model))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which `model`, or the model inside a PEFT model, runs without its adapters.

    Raises:
        ValueError: an adapter is merged, so that the weights are not the model's own.
    """
    tuners = list(_tuners(model))
    for module in tuners:
        if getattr(module, "merged", False):
            raise ValueError(
                "The model has an adapter that is merged into its weights and can be taken out again; take it out "
                "(unmerge_adapter), or make it part of them for good (merge_and_unload)."
            )
    active = [module for module in tuners if not module.disable_adapters]
    # PEFT makes an adapter that is enabled again trainable, also one that was frozen.
    flags = {parameter: parameter.requires_grad for module in active for parameter in module.parameters()}
    try:
        for module in active:
            module.enable_adapters(False)
        yield
    finally:
        for module in active:
            module.enable_adapters(True)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _tuners(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that PEFT has put in the place of a model's own."""
    if sys.modules.get("peft") is None:  # no adapters without it, and it is slow to import
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    yield from (module for module in model.modules() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)))


def plain_name(name: str) -> str:
    """A weight's name without what PEFT puts into it."""
    for part in (".token_adapter.base_layer.", ".base_layer.", ".original_module."):
        name = name.replace(part, ".")
    return name


def adapter_parameters(model: nn.Module) -> set[int]:
    """The `id` of every parameter and buffer that an adapter brought."""
    brought: set[int] = set()
    own: set[int] = set()
    for module in _tuners(model):
        # of a module that is trained as a whole, a copy is
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module.original_module
        own |= {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
        brought |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    # A tuner layer holds its base layer as a part, so that both are among its parameters.
    return brought - own


def state_without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The state of the transformers model inside `model`, of any shapes, under the names that it has without adapters.

    No copies: the live values.
    """
    inner = inner_model(model)
    brought = adapter_parameters(inner)
    state = inner.state_dict(keep_vars=True)
    return {plain_name(name): value.detach() for name, value in state.items() if id(value) not in brought}
