"""Structures that go before the blocks are walked: nothing that stays can be fitted to what they gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ....model.offload import resident
from ...calibration import Calibration
from ..configuration import DSAStructuredConfig
from ..gradients import Products
from ..importance import IMPORTANCES, Parts, importance_of
from ..layout import uniform
from ..slicing import cut_out, rewriting
from ..structure import WHOLE, Structures, tensor_named
from .blocks import makes_of
from .usage import Usage, collect_usage


@torch.no_grad()
def remove_wholes(
    model: nn.Module,
    units: Mapping[str, Structures],
    counts: Mapping[str, int],
    calibration: Calibration,
    config: DSAStructuredConfig,
    products: Mapping[str, Sequence[Products]],
) -> dict[str, list[int]]:
    """Cut the least important experts or blocks out of a model, in place: unit -> the numbers of those that went.

    Raises:
        ValueError: with a plain class for layout, no configuration says what is left without just these blocks.
    """
    chosen = choose_wholes(model, units, counts, calibration, config, products)
    units = {unit: units[unit] for unit in chosen}
    if config.layout != "per_layer" and any(each.kind == "block" for each in units.values()):
        uniform(model, units, counts, {unit: gone.tolist() for unit, gone in chosen.items()})
    for unit, gone in chosen.items():
        with rewriting(model, units[unit]):
            cut_out(model, units[unit], gone)
    return {unit: gone.tolist() for unit, gone in chosen.items()}


@torch.no_grad()
def choose_wholes(
    model: nn.Module,
    units: Mapping[str, Structures],
    counts: Mapping[str, int],
    calibration: Calibration,
    config: DSAStructuredConfig,
    products: Mapping[str, Sequence[Products]],
) -> dict[str, Tensor]:
    """Unit -> the numbers of the least important experts or blocks, (n,) int64 ascending, where any go."""
    units = {unit: each for unit, each in units.items() if each.kind in WHOLE and counts[unit]}
    found, chosen = scores_of_wholes(model, units, calibration.batches(config.batch_size), config, products), {}
    for unit, each in units.items():
        scores = found[unit]
        scores[list(each.fixed)] = float("inf")
        if each.kind == "block":
            _keep_one_of_each(scores, makes_of(model, each))
        if (able := int(scores.isfinite().sum())) < counts[unit]:
            raise ValueError(f"{unit}: {counts[unit]} are to go, and only {able} of {len(each)} can; ask for less.")
        # Stable, so that of equals the first go, on every machine.
        chosen[unit] = scores.argsort(stable=True)[: counts[unit]].sort().values.cpu()
    return chosen


@torch.no_grad()
def scores_of_wholes(
    model: nn.Module,
    units: Mapping[str, Structures],
    batches: Sequence[Mapping[str, Tensor]],
    config: DSAStructuredConfig,
    products: Mapping[str, Sequence[Products]],
) -> dict[str, Tensor]:
    """Unit -> the importances of its experts or blocks in the model as it is, (structures,) float32.

    Args:
        batches: inputs of the model by name, (samples, length, ...), run once where a row observes what they do.
    """
    row = {unit: importance_of(each.kind, config.importance) for unit, each in units.items()}
    watched = {unit: each for unit, each in units.items() if IMPORTANCES.fact(row[unit], "observes") == "usage"}
    usage = collect_usage(model, watched, batches) if watched else {}
    found = {}
    for unit, each in units.items():
        name = f"{config.data.seed}:{unit}"
        with resident(model, [each.block] if each.cuts else []):
            parts = _parts_of(model, each, products.get(unit, ()), name, usage.get(unit))
            found[unit] = IMPORTANCES[row[unit]](parts)
    return found


def _keep_one_of_each(scores: Tensor, makes: Sequence[tuple[type, ...]]) -> None:
    """Make the most important block of every make infinitely important, (blocks,) in place."""
    for make in dict.fromkeys(makes):
        own = [number for number, other in enumerate(makes) if other == make]
        scores[own[int(scores[own].argmax())]] = float("inf")


def _parts_of(
    model: nn.Module, structures: Structures, products: Sequence[Products], name: str, usage: Usage | None
) -> Parts:
    number = len(structures)
    tensors = [tensor_named(model, cut.tensor) for cut in structures.cuts]
    makes = [tensor.view(number, -1, tensor.shape[-1]) for tensor in tensors if tensor.dim() > 1]
    modules = [dict(model.get_submodule(whole).named_parameters()) for whole in structures.wholes]
    for own in modules[0] if structures.kind == "expert" and modules else ():
        if modules[0][own].dim() > 1:
            makes.append(torch.stack([each[own].data for each in modules]))
    return Parts(makes, (), torch.arange(number), None, products=products, name=name, usage=usage)
