"""PEFT adapters in a model: recognised, so that what they brought is never taken for a weight of the model itself."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

from torch import nn


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_adapters(model: nn.Module) -> bool:
    """Whether saving `model` writes PEFT adapters and not its weights."""
    return bool(getattr(model, "peft_config", None))


def without_adapters(model: nn.Module) -> AbstractContextManager:
    """A context in which a PEFT model runs without its adapters."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def plain_name(name: str) -> str:
    """A weight's name without what PEFT puts into it."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def adapter_parameters(model: nn.Module) -> set[int]:
    """The `id` of every parameter that an adapter brought."""
    if sys.modules.get("peft") is None:  # no adapters without it, and it is slow to import
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    brought: set[int] = set()
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            base = module.original_module  # what is trained beside it is a copy
        else:
            continue
        own |= {id(parameter) for parameter in base.parameters()}
        brought |= {id(parameter) for parameter in module.parameters()}
    # A tuner layer holds its base layer as a part, so that both are among its parameters.
    return brought - own
