"""Which lists of modules are a model's blocks: found by structure, never by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import is_experts


class UnprunableError(ValueError):
    """The model has a weight, or as a whole a structure, that cannot be pruned."""


def find_stacks(model: nn.Module) -> list[str]:
    """Names of the module lists that hold the model's blocks.

    Lists of composite modules that own matrices, the outermost of each branch. In an encoder-decoder of text both
    stacks count. In a model with a text tower (a submodule that carries the model's text configuration) only that
    tower does. Where lists are left to choose from, those under the model's own configuration come first, and of them
    the one with the most weights.

    Raises:
        UnprunableError: there is none.
    """
    tower = _text_tower(model)
    found = list(_outermost_stacks(model.get_submodule(tower), tower))
    if not found:
        raise UnprunableError(
            f"{type(model).__name__} has no list of transformer blocks; name one with blocks=['...'] if there is."
        )
    if len(found) == 1:
        return found
    if _is_encoder_decoder(model):
        return [name for name in found if hasattr(_configuration(model, name), "vocab_size")] or found
    own = [name for name in found if _configuration(model, name) is _configuration(model, tower)] or found
    return [max(own, key=lambda name: _size(model, name))]


def other_stacks(model: nn.Module, names: Collection[str]) -> dict[str, int]:
    """The lists of blocks that are none of `names` -> their weights: of another tower, in which nothing is pruned."""
    return {name: _size(model, name) for name in _outermost_stacks(model, "") if name not in names}


def _size(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())


def _text_tower(model: nn.Module) -> str:
    """Name of the outermost submodule whose configuration is the model's text configuration; "" for the model."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is None or text is config or (_is_encoder_decoder(model) and model.main_input_name == "input_ids"):
        return ""
    return next((name for name, module in model.named_modules() if getattr(module, "config", None) is text), "")


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _configuration(model: nn.Module, name: str):
    """The configuration of the innermost module around `name` that carries one, `name` included."""
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None or not name:
            return config
        name = name.rpartition(".")[0]


def _outermost_stacks(module: nn.Module, name: str) -> Iterator[str]:
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if _is_stack(child):
            yield full
        else:
            yield from _outermost_stacks(child, full)


def _is_stack(module: nn.Module) -> bool:
    """A list of modules, each of which has parts and owns a linear map or a fused parameter."""
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    return all(
        len(list(block.children())) > 0
        and any(isinstance(part, (nn.Linear, Conv1D)) or is_experts(part) for part in block.modules())
        for block in module
    )
