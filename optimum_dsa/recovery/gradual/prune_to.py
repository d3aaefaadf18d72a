"""One moment of gradual pruning: from the zeros that a model has to a higher sparsity, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ...model.adapters import plain_name
from ...model.architecture import GRANULARITIES, Architecture
from ...pruning.allocate import allocate, architecture_for, standing_zeros
from ...pruning.allocation import Allocation, fit_to_budget, split_count
from ...pruning.calibration import Calibration
from ...pruning.configuration import DSAConfig
from ...pruning.prune import prune
from ...pruning.report import PruningReport
from ...pruning.zeros import count_zeros


def prune_to(
    model: nn.Module,
    calibration: Calibration | None,
    config: DSAConfig,
    sparsity: float,
    proposed: Mapping[str, float] | None = None,
) -> tuple[PruningReport | None, dict[str, float]]:
    """Prune `model` in place until `sparsity`, and what was proposed for each unit at the config's own sparsity.

    No zero is given back, unless the config says `revive`.

    Args:
        sparsity (`float`): at most the config's, which is met to one weight.
        proposed (`Mapping[str, float]`, *optional*): what an earlier call gave back, to allocate alike; by default the
            allocation is computed from the model as it is now.

    Returns:
        The report, `None` where the model is as sparse already, and the proposal.
    """
    architecture = architecture_for(model, config)
    zeros = count_zeros(model, architecture)
    standing = standing_zeros(model, architecture, config)
    total = sum(weight.size for weight in architecture.weights)
    if proposed is None:
        allocation = allocate(model, calibration, config, architecture, standing)
        proposed = {plain_name(unit): value for unit, value in allocation.sparsity.items()}
    if round(sparsity * total) <= sum(zeros.values()):
        return None, dict(proposed)
    # Scaled down from the final one, so that every unit is on its way to where it ends.
    share = sparsity / config.sparsity
    scaled = {unit: value * share for unit, value in proposed.items()}
    counts = _counts(architecture, config, scaled, sparsity, standing)
    sizes = {weight.name: weight.size for weight in architecture.weights}
    shares = {name: counts[name] / size for name, size in sizes.items()}
    given = Allocation(shares, sizes, str(config.allocation), "matrix")
    # the overrides are in what was proposed
    whole = {"granularity": "matrix", "min_sparsity": 0.0, "max_sparsity": 1.0, "overrides": ()}
    step = replace(config, sparsity=given.overall, allocation=given, **whole)
    return replace(prune(model, calibration, step), config=config), dict(proposed)


def _counts(
    architecture: Architecture,
    config: DSAConfig,
    proposed: Mapping[str, float],
    sparsity: float,
    standing: Mapping[str, int],
) -> dict[str, int]:
    """Weights to remove from each matrix, as near to `proposed` as what is removed already allows."""
    for granularity in GRANULARITIES:
        units = {plain_name(unit): weights for unit, weights in architecture.units(granularity).items()}
        if units.keys() == proposed.keys():
            break
    sizes = {unit: sum(weight.size for weight in weights) for unit, weights in units.items()}
    floors = {unit: sum(standing.get(weight.name, 0) for weight in weights) for unit, weights in units.items()}
    # Without the lower bound of the config, below which the first steps of a schedule are.
    counts = fit_to_budget(proposed, sizes, sparsity, 0.0, config.max_sparsity, floors=floors).counts()
    divided = {}
    for unit, weights in units.items():
        divided |= split_count(counts[unit], {weight.name: weight.size for weight in weights}, standing)
    return divided
