"""Whole blocks as structures: a model without some of them gives what it gives with these handing their input on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ....common.escaping import one_line
from ....model.architecture import Architecture
from ....model.calls import feed
from ....model.inputs import text_part
from ..structure import Found, Structures


# What configurations and modules call the number of blocks, and parts of blocks their place among them.
DEPTHS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"),
    "num_decoder_layers",
)
_PLACES = ("layer_idx", "layer_id", "layer_number", "layer_index")

# Settings that are a number of first blocks, and lists of the numbers of some.
_FIRST = ("first_k_dense_replace", "num_dense_layers")
_NUMBERED = ("mlp_only_layers", "moe_layers")

# holder, attribute, value
_Change = tuple[Any, str, Any]


def find_blocks(model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]) -> Found:
    """The blocks of a model, a unit for each stack, and the weights of those that cannot go -> why.

    Each is tried: without it the model is to give what it gives when it hands its input on.

    Args:
        batch (`Mapping[str, Tensor]`): inputs of the model by name, one short sample: (1, length, ...).
    """
    units, left = {}, dict(architecture.dense)
    for stack in architecture.stacks:
        names = tuple(block.name for block in stack.blocks)
        unit = Structures(f"{stack.name}:block", "block", (), (), wholes=names)
        kept = {number for number, block in enumerate(names) if _excluded(architecture, block)}
        troubles = {
            number: "a part of it is excluded" if number in kept else _trouble(model, unit, number, batch)
            for number in range(len(names))
        }
        fixed = tuple(number for number, why in troubles.items() if why is not None)
        for number in fixed:
            left |= {
                weight.name: f"its block cannot go: {troubles[number]}" for weight in stack.blocks[number].weights
            }
        makes = makes_of(model, unit)
        least = len(fixed) + len({*makes} - {makes[number] for number in fixed})
        if least < len(names):
            units[unit.unit] = replace(unit, least=least, fixed=fixed)
        else:  # first of all, as errors name the first
            left = {stack.name: "one block of every make stays, and there are no others"} | left
    return Found(units, left)


def makes_of(model: nn.Module, structures: Structures) -> list[tuple[type, ...]]:
    """Of what modules each block is made: one of every make stays, such as one with attention, for the cache."""
    return [tuple(type(part) for part in model.get_submodule(name).modules()) for name in structures.wholes]


def _excluded(architecture: Architecture, block: str) -> bool:
    return any(why == "excluded" and name.startswith(f"{block}.") for name, why in architecture.dense.items())


@torch.no_grad()
def _trouble(model: nn.Module, structures: Structures, number: int, batch: Mapping[str, Tensor]) -> str | None:
    """Why a block cannot go, or `None`: it is tried."""
    changes = without_blocks(model, structures, {number})
    before = [(holder, attribute, getattr(holder, attribute)) for holder, attribute, _ in changes]
    handles = pass_by(model, structures, torch.tensor([number]))
    training = model.training
    try:
        model.eval()
        expected = output_of(model, batch)
        for handle in handles:
            handle.remove()
        apply(changes)
        given = output_of(model, batch)
    except Exception as error:  # noqa: BLE001 - code that was written for other numbers may fail in any way
        return one_line(str(error))
    finally:
        for handle in handles:
            handle.remove()
        apply(before)
        model.train(training)
    if given.shape != expected.shape or (given - expected).abs().max() > 1e-3 * expected.abs().max():
        return "what is left computes something else without it"
    return None


def output_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a model gives first, float32: logits, or the last hidden states."""
    return feed(model, batch)[0].float()


def pass_by(model: nn.Module, structures: Structures, gone: Tensor) -> list[Any]:
    """Have the blocks `gone`, (n,) int64, give what they are given, in place; the handles that undo it."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden, _ = through(args, kwargs, output)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    names = (structures.wholes[number] for number in gone.tolist())
    return [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in names]


def through(args: tuple, kwargs: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """What a block was given and what it made of it, (samples, ..., hidden size) both."""
    before = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return before, output if isinstance(output, Tensor) else output[0]


def without_blocks(model: nn.Module, structures: Structures, gone: Collection[int]) -> list[_Change]:
    """What has to be set so that a model is without some blocks; nothing is changed yet."""
    stack = structures.wholes[0].rpartition(".")[0]
    owner, _, name = stack.rpartition(".")
    stays = [number for number in range(len(structures)) if number not in gone]
    blocks = {number: model.get_submodule(structures.wholes[number]) for number in stays}
    changes: list[_Change] = [(model.get_submodule(owner), name, nn.ModuleList(blocks.values()))]
    for place, number in enumerate(stays):
        for part in blocks[number].modules():
            changes += [(part, each, place) for each in _PLACES if vars(part).get(each) == number != place]
    around = [model.get_submodule(".".join(owner.split(".")[:depth])) for depth in range(owner.count(".") + 2)]
    configs = {id(config): config for module in around if (config := getattr(module, "config", None)) is not None}
    part = text_part(model.config)
    for holder in (*around, *(configs | {id(part): part}).values()):
        changes += [(holder, each, value) for each, value in shorter(holder, len(structures), gone).items()]
    return changes


def apply(changes: Sequence[_Change]) -> None:
    """Set what `without_blocks` gave, in place."""
    for holder, attribute, value in changes:
        setattr(holder, attribute, value)


def shorter(holder: Any, count: int, gone: Collection[int]) -> dict[str, Any]:
    """What a configuration or module says of `count` blocks once some are gone: its numbers, and lists by block."""
    found: dict[str, Any] = {}
    places = {number: place for place, number in enumerate(n for n in range(count) if n not in gone)}
    for name, value in vars(holder).items():
        if name in _FIRST and isinstance(value, int):
            found[name] = value - sum(number < value for number in gone)
            continue
        if name in _NUMBERED and isinstance(value, (list, tuple)):
            found[name] = type(value)(places[number] for number in value if number in places)
            continue
        by_block = "layer" in name or "block" in name
        if by_block and isinstance(value, (list, tuple)) and len(value) == count:
            found[name] = type(value)(each for number, each in enumerate(value) if number not in gone)
        elif name in DEPTHS and isinstance(value, int) and value == count:
            found[name] = count - len(gone)
    return found
