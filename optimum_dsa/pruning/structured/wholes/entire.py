"""Attention and MLPs that go from a block with all that they are made of, or stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....model.architecture import Architecture
from ....model.inputs import text_part
from ....model.walk import WalkedBlock, walk_blocks
from ..importance import IMPORTANCES, Parts, importance_of
from ..slicing import trouble
from ..structure import ENTIRE, Found, Structures
from ..structures import find_structures
from .usage import Usage, collect_usage


if TYPE_CHECKING:
    from ..widths.dense import Dense


# He et al., 2024, "What Matters in Transformers?": attention and MLPs go whole, by how far they turn their tokens.
REFERENCE = "https://arxiv.org/abs/2406.15786"

_FIRST = "the first attention of its kind stays: by it a cache counts its tokens"
_SHARED = "all query heads share its head of keys and values, which goes with none of them"
_TIED = "its heads go alike from all blocks, which share a tensor of them"


def find_entire(model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]) -> Found:
    """The attention and the MLP of every block, by unit, and the weights of those that cannot go -> why.

    Each is tried: without it the block is to give what it gives when the matrices that read it are silenced. Of one
    that cannot go all structures are said to have to stay.

    Args:
        batch: inputs of the model by name, one short sample: (1, length, ...).
    """
    found = find_structures(model, architecture, batch)
    units, left = {}, dict(found.left)
    firsts = _firsts(model, found.structures)
    tried: dict[tuple, tuple[Structures | None, str | None]] = {}
    for walked in walk_blocks(model, architecture, [batch], sequential=False):
        for unit, each in found.structures.items():
            if each.block != walked.name or each.kind == "expert":
                continue
            why = _stays(each) or (_FIRST if unit in firsts else None)
            if why is None:
                alike = (each.kind, len(each), *((each.within(cut.tensor), cut.axis) for cut in each.cuts))
                if alike not in tried:
                    tried[alike] = _able(walked, each)
                able, why = tried[alike]
                if able is not None:
                    units[unit] = replace(each, entire=True, least=0, absent=able.absent)
                    continue
            units[unit] = replace(each, entire=True, least=len(each))
            left |= {cut.tensor: why for cut in each.cuts if model.get_parameter(cut.tensor).dim() > 1}
    return Found(units, left)


def _stays(structures: Structures) -> str | None:
    """Why they cannot all go, or `None`."""
    if structures.tied:
        return _TIED
    return _SHARED if structures.heads[0] and not structures.heads[1] else None


def _firsts(model: nn.Module, units: Mapping[str, Structures]) -> set[str]:
    """The units of the first attention of every stack, and of every type of layer that a configuration tells apart.

    None of a model that writes nothing, and has no cache.
    """
    if hasattr(model, "can_generate") and not model.can_generate():
        return set()
    types = getattr(text_part(model.config), "layer_types", None) or ()
    attention = {unit: each.block for unit, each in units.items() if each.heads[0]}
    firsts: dict[tuple[str, str], str] = {}
    for block in attention.values():
        stack, _, number = block.rpartition(".")
        kind = types[int(number)] if number.isdecimal() and int(number) < len(types) else ""
        firsts.setdefault((stack, kind), block)
    # With a cross-attention beside it.
    return {unit for unit, block in attention.items() if block in firsts.values()}


def _able(walked: WalkedBlock, structures: Structures) -> tuple[Structures | None, str | None]:
    """The structures as they can all go from the block that a walk stands at; or `None` and why not: it is tried."""
    why = "cannot be cut: nothing tells what its block gives without it"
    for absent in _ways(walked, structures):
        able = replace(structures, entire=True, least=0, absent=absent)
        if (found := trouble(walked, able)) is None:
            return able, None
        why = found
    return None, why


def _ways(walked: WalkedBlock, structures: Structures) -> Iterator[tuple[str, str, int] | None]:
    """What may have to be left out of a block, for `leave_out`: nothing; what holds all of it; what makes it."""
    block = walked.model.get_submodule(walked.name)
    if not structures.heads[0]:  # matrices of no rows and of no columns are multiplied with like all others
        yield None
    owners = {structures.within(cut.tensor).rpartition(".")[0] for cut in structures.cuts}
    makers = {structures.within(cut.tensor).rpartition(".")[0] for cut in structures.makes}
    readers = {structures.within(cut.tensor).rpartition(".")[0] for cut in structures.reads}
    for held, inside in ((owners, True), (makers, False)):
        path = _around(held)
        if path and len(readers) == 1 and (values := _values(walked, block.get_submodule(path))) is not None:
            yield path, min(readers).removeprefix(f"{path}.") if inside else "", values


def _around(names: Collection[str]) -> str:
    """The name of the smallest module that holds these modules, or of one that holds one; "" for the block itself."""
    paths = [name.split(".")[: -1 if len(names) == 1 else None] for name in names]
    alike = 0
    while all(len(path) > alike for path in paths) and len({path[alike] for path in paths}) == 1:
        alike += 1
    return ".".join(paths[0][:alike])


def _values(walked: WalkedBlock, module: nn.Module) -> int | None:
    """How many values a module of the block returns, 0 for a tensor alone; `None` where nothing says it."""
    given: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        walked.run()
    finally:
        handle.remove()
    if not given:
        return None
    output = given[0]
    return 0 if isinstance(output, Tensor) else len(output) if isinstance(output, tuple) else None


def entire_gone(units: Mapping[str, Structures], counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Unit -> the numbers of those that go, of units that go with all of their structures or none."""
    return {unit: list(range(counts[unit])) for unit, each in units.items() if each.entire}


def worth_of(dense: Dense) -> dict[str, float]:
    """Unit -> how important all of it is, by the row that scores what goes at once; 0 where it has to stay."""
    config, units = dense.config, dense.units
    row = importance_of(next(iter(units.values())).goes_as, config.importance)
    usage = None
    if IMPORTANCES.fact(row, "observes") == "usage":
        able = {unit: each for unit, each in units.items() if each.least < len(each)}
        seen = collect_usage(dense.model, able, dense.calibration.batches(config.batch_size))
        none = Usage(torch.zeros(1), torch.zeros(1))
        each = [seen.get(unit, none) for unit in units]
        usage = Usage(torch.cat([one.tokens.cpu() for one in each]), torch.cat([one.output.cpu() for one in each]))
    name = f"{config.data.seed}:{' '.join(ENTIRE)}"
    scores = IMPORTANCES[row](Parts((), (), torch.arange(len(units)), name=name, usage=usage))
    return dict(zip(units, scores.tolist()))


def first_to_go(dense: Dense) -> dict[str, float]:
    """Unit -> a share that says its turn: those go first whose share is nearest to 1, as far as the budget reaches.

    The order is that of importance for what each costs.
    """
    worth = dense.worth
    costs = {unit: dense.sizes[unit].cost * dense.sizes[unit].count for unit in dense.units}
    order = sorted(worth, key=lambda unit: worth[unit] / max(costs[unit], 1))
    return {unit: 1 - (place + 1) / (len(order) + 1) for place, unit in enumerate(order)}
