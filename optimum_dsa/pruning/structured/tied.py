"""Heads that go alike from all blocks of a stack, which share a tensor with a row for each of them: T5's bias."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture
from ...model.offload import is_offloaded
from .instead import computing_with, evaluating, matrices_without
from .slicing import cut_out
from .structure import Structures
from .wholes.blocks import output_of


if TYPE_CHECKING:
    from .widths.dense import Dense


_ELSEWHERE = (
    "its heads go alike from all blocks, which has to be tried on all of them at once, and some weights are elsewhere "
    "(offloaded): load the model without device_map"
)


def why_not_alone(structures: Structures) -> str:
    """Why no head of a block can go by itself, in words."""
    return (
        f"cannot be cut: blocks share a tensor with a row for each of {len(structures) * structures.heads[0]} heads "
        "(slopes, biases of positions), which would go to other heads than those that stay"
    )


def tied_structures(
    model: nn.Module,
    architecture: Architecture,
    found: Mapping[str, Structures],
    bound: Collection[str],
    batch: Mapping[str, Tensor],
) -> tuple[dict[str, Structures], dict[str, str]]:
    """What is `found`, by unit, less what can go neither alone nor alike from all blocks, whose matrices -> why.

    Args:
        bound: units whose structures cannot go from one block alone; with them go those in their place in others.
        batch: inputs of the model by name, one short sample: (1, length, ...).
    """
    stacks = {block.name: stack for stack in architecture.stacks for block in stack.blocks}
    groups: dict[tuple[str, ...], list[Structures]] = {}
    for each in found.values():
        place = (stacks[each.block].name, each.kind, *(each.within(cut.tensor) for cut in each.reads))
        groups.setdefault(place, []).append(each)
    structures, left = dict(found), {}
    together = not is_offloaded(model)  # one block is there at a time
    for (stack, kind, *readers), group in groups.items():
        if not any(each.unit in bound for each in group):
            continue
        alike = [replace(each, tied=f"{stack}:{kind}:{readers[0]}", slopes=0) for each in group]
        everywhere = together and len(group) == len(stacks[group[0].block].blocks)
        if everywhere and len({len(each) for each in group}) == 1 and _computes_the_same(model, alike, batch):
            structures |= {each.unit: each for each in alike}
            continue
        if all(each.slopes for each in group):
            continue  # each block keeps the rows of its own
        for each in group:
            del structures[each.unit]
            matrices = (cut.tensor for cut in each.cuts if model.get_parameter(cut.tensor).dim() > 1)
            left |= dict.fromkeys(matrices, why_not_alone(each) if together else _ELSEWHERE)
    return structures, left


@torch.no_grad()
def _computes_the_same(model: nn.Module, together: Sequence[Structures], batch: Mapping[str, Tensor]) -> bool:
    """Whether the model with the first of these structures cut out of every block gives what it gives without it."""
    gone, values = torch.tensor([0]), {}
    for each in together:
        values |= matrices_without(model, each, gone, None, 0.0)
    with evaluating(model):
        with computing_with(model, values):
            silenced = output_of(model, batch)
        try:
            with _put_back(model, together):
                for each in together:
                    cut_out(model, each, gone)
                cut = output_of(model, batch)
        except Exception:  # noqa: BLE001 - code that was written for other sizes may fail in any way
            return False
    return bool((silenced - cut).abs().max() <= 1e-3 * silenced.abs().max())


@contextmanager
def _put_back(model: nn.Module, together: Sequence[Structures]) -> Iterator[None]:
    """Have the modules of these blocks be what they were at the end; no weight is copied."""
    before = []
    for module in {module for each in together for module in model.get_submodule(each.block).modules()}:
        before.append((module, whole := module.__dict__))
        # Of its tables of parameters and modules, too.
        module.__dict__ = {name: copy.copy(own) if isinstance(own, dict) else own for name, own in whole.items()}
    try:
        yield
    finally:
        for module, whole in before:
            module.__dict__ = whole


def tied_gone(dense: Dense, counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Unit -> the numbers of those that go, of units whose structures go alike from all blocks of a stack.

    Each has the mean over blocks of its share in what all of the block are worth to the dense model, so that every
    block has a say.
    """
    groups: dict[str, list[str]] = {}
    for unit, each in dense.units.items():
        if each.tied:
            groups.setdefault(each.tied, []).append(unit)
    found = {}
    for units in groups.values():
        shares = [(worth := dense.importances[unit].double()) / worth.sum().clamp_min(1e-300) for unit in units]
        chosen = torch.stack(shares).mean(0).argsort(stable=True)[: counts[units[0]]].sort().values.tolist()
        found |= dict.fromkeys(units, chosen)
    return found
