"""One moment of gradual pruning: from the zeros that a model has to a higher sparsity, exactly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ...model.adapters import plain_name
from ...model.architecture import GRANULARITIES, Architecture
from ...pruning.allocate import allocate, architecture_for
from ...pruning.allocation import Allocation
from ...pruning.allocation.budget import fit_counts, split_count
from ...pruning.calibration import Calibration
from ...pruning.configuration import DSAConfig
from ...pruning.prune import prune
from ...pruning.report import PruningReport
from ...pruning.zeros import count_zeros


logger = logging.getLogger(__name__)


def prune_to(
    model: nn.Module,
    calibration: Calibration | None,
    config: DSAConfig,
    sparsity: float,
    proposed: Mapping[str, float] | None = None,
) -> tuple[PruningReport | None, dict[str, float]]:
    """Prune `model` in place until `sparsity`, and what was proposed for each unit at the config's own sparsity.

    No zero is given back: every unit loses at least what its emptiest matrix has lost. Zeros that do not fit the
    pattern, such as those of a matrix pruned as a whole, come on top of what is asked, with a warning.

    Args:
        sparsity (`float`): at most the config's, which is met to one weight.
        proposed (`Mapping[str, float]`, *optional*): what an earlier call gave back, to allocate alike; by default the
            allocation is computed from the model as it is now.

    Returns:
        The report, `None` where the model is as sparse already, and the proposal.
    """
    architecture = architecture_for(model, config)
    zeros = count_zeros(model, architecture)
    total = sum(weight.size for weight in architecture.weights)
    if proposed is None:
        allocation = allocate(model, calibration, config, architecture)
        proposed = {plain_name(unit): value for unit, value in allocation.sparsity.items()}
    if round(sparsity * total) <= sum(zeros.values()):
        return None, dict(proposed)
    # Scaled down from the final one, so that every unit is on its way to where it ends.
    share = sparsity / config.sparsity
    counts = _counts(architecture, config, {unit: value * share for unit, value in proposed.items()}, sparsity, zeros)
    sizes = {weight.name: weight.size for weight in architecture.weights}
    shares = {name: counts[name] / size for name, size in sizes.items()}
    given = Allocation(shares, sizes, str(config.allocation), "matrix")
    step = replace(
        config, sparsity=given.overall, allocation=given, granularity="matrix", min_sparsity=0.0, max_sparsity=1.0
    )
    report = replace(prune(model, calibration, step), config=config)
    surplus = report.removed - sum(counts.values())
    if surplus > 0:
        logger.warning(
            "%d weights more than asked are zero: zeros that the model had do not fit the pattern %s.",
            surplus,
            config.recipe.pattern,
        )
    return report, dict(proposed)


def plain_report(report: PruningReport) -> PruningReport:
    """`report` under the names that weights have without adapters."""
    allocation = report.allocation
    sparsity, sizes = (
        {plain_name(name): value for name, value in part.items()} for part in (allocation.sparsity, allocation.sizes)
    )
    return replace(
        report,
        allocation=Allocation(sparsity, sizes, allocation.name, allocation.granularity),
        achieved={plain_name(name): value for name, value in report.achieved.items()},
        dense={plain_name(name): why for name, why in report.dense.items()},
    )


def _counts(
    architecture: Architecture,
    config: DSAConfig,
    proposed: Mapping[str, float],
    sparsity: float,
    zeros: Mapping[str, int],
) -> dict[str, int]:
    """Weights to remove from each matrix, as near to `proposed` as what is removed already allows."""
    for granularity in GRANULARITIES:
        units = {plain_name(unit): weights for unit, weights in architecture.units(granularity).items()}
        if units.keys() == proposed.keys():
            break
    # The emptiest matrix: a unit has one sparsity, and no zero of any of its matrices is given back.
    low = [max(zeros[weight.name] / weight.size for weight in weights) for weights in units.values()]
    sizes = torch.tensor([sum(weight.size for weight in weights) for weights in units.values()], dtype=torch.float64)
    low = torch.tensor(low, dtype=torch.float64)
    # What is emptier than the bound already stays so.
    high = low.clamp(min=config.max_sparsity)
    if float((low * sizes).sum()) > sparsity * float(sizes.sum()) + 0.5:
        raise ValueError(
            f"A sparsity of {sparsity:.4f} cannot be reached without giving zeros back: the zeros that the model has "
            "are too unevenly spread over the matrices of its blocks; use granularity='matrix'."
        )
    values = torch.tensor([proposed[unit] for unit in units], dtype=torch.float64)
    counts = fit_counts(values, sizes, sparsity, low, high).tolist()
    divided = {}
    for weights, count in zip(units.values(), counts):
        divided |= split_count(count, {weight.name: weight.size for weight in weights})
    return divided
