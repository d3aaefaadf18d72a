"""Statistics -> the sparsity of every unit, at exactly the budget."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ..model.architecture import Architecture, find_architecture
from ..model.walk import WalkedBlock, walk_blocks
from .allocation import Allocation, Unit, fit_to_budget, fit_to_levels, fit_to_matrices
from .configuration import DSAConfig
from .source import Known, Source, as_calibration, batches_of, progress


logger = logging.getLogger(__name__)


def architecture_for(model: nn.Module, config: DSAConfig) -> Architecture:
    """What `config` prunes in `model`; raises where its pattern does not fit a weight."""
    found = find_architecture(model, config.blocks, config.exclude, config.include, config.skip_unprunable)
    for weight in found.weights:
        config.resolved.pattern.check(weight.name, weight.shape[1])
    return found


@torch.no_grad()
def allocate(
    model: nn.Module,
    calibration: Source | None,
    config: DSAConfig,
    architecture: Architecture | None = None,
) -> Allocation:
    """The sparsity of every unit of `model`, from its weights as they are; nothing is changed.

    `calibration` as in `prune`; it may be `None` where the allocation needs no data.

    Raises:
        ValueError: calibration data are needed and missing, or the budget cannot be met.
    """
    config.check_settled()
    calibration = as_calibration(calibration, model)
    architecture = architecture or architecture_for(model, config)
    if config.allocator is None:
        return _given(config, architecture)
    measured = _measure(model, architecture, calibration, config)
    proposed = config.allocator.propose(measured, config.sparsity, config.spread)
    # It looks like a result: without a word one would believe that the allocation was computed.
    if config.allocator.reads != "nothing" and config.spread != 0 and len(set(proposed.values())) == 1 < len(measured):
        logger.warning(
            "Allocation %s does not tell the units of this model apart: all get %g, as with uniform.",
            config.allocation,
            config.sparsity,
        )
    return fit(proposed, architecture, config, config.unit_granularity, str(config.allocation))


def fit(
    proposed: dict[str, float], architecture: Architecture, config: DSAConfig, granularity: str, name: str = "custom"
) -> Allocation:
    """What units ask for, brought to the config's budget, bounds and pattern: what `prune` will remove, to one weight.

    Args:
        proposed (`dict[str, float]`): unit -> sparsity, of every unit of `architecture` at `granularity`.
    """
    units = architecture.units(granularity)
    matrices = {unit: [weight.size for weight in weights] for unit, weights in units.items()}
    sizes = {unit: sum(parts) for unit, parts in matrices.items()}
    bounds = (config.min_sparsity, config.max_sparsity)
    found = fit_to_budget(proposed, sizes, config.sparsity, *bounds, name, granularity)
    return fit_to_pattern(fit_to_matrices(found, matrices, *bounds), config)


def fit_to_pattern(allocation: Allocation, config: DSAConfig) -> Allocation:
    """What the config's pattern can follow: the allocation itself, or with N:M its units rounded to whole N.

    Within the config's bounds, which give way where a user's own allocation lies outside.
    """
    pattern = config.resolved.pattern
    if not pattern.in_groups:
        return allocation
    low = min(config.min_sparsity, *allocation.sparsity.values())
    high = max(config.max_sparsity, *allocation.sparsity.values())
    return fit_to_levels(allocation, pattern.width, low, high)


def _measure(
    model: nn.Module,
    architecture: Architecture,
    calibration: Known | None,
    config: DSAConfig,
) -> dict[str, object]:
    """The allocator's heavy half, for every unit of the config's granularity."""
    method = config.resolved
    batches = None
    if method.allocation_reads:
        batches = batches_of(calibration, config, f"allocation {config.allocation!r}")
    measured = {}
    for walked in walk_blocks(
        model,
        architecture,
        batches,
        reads=method.allocation_reads,
        # One pass a block: nothing is changed here, so that its outputs are the same either way.
        sequential=False,
        progress=progress("Allocating"),
    ):
        measured |= _measure_block(walked, config)
        # The statistics of one block, and not of two: the next one's are collected before the name is another's.
        del walked
    return measured


def _measure_block(walked: WalkedBlock, config: DSAConfig) -> dict[str, object]:
    """The same of the units of one block."""
    measured = {}
    for name, weights in walked.block.units(config.unit_granularity).items():
        unit = Unit(
            name,
            walked.block.depth,
            [walked.tensor(weight) for weight in weights],
            [walked.statistics.get(weight.name) for weight in weights],
            config.resolved.allocation_metric,
        )
        measured[name] = config.allocator.measure(unit)
    return measured


def _given(config: DSAConfig, architecture: Architecture) -> Allocation:
    """The user's own allocation, held against the model and the target."""
    given = config.given_allocation()
    granularity = architecture.granularity_of(given.sparsity)
    if granularity is None:
        expected = architecture.units(given.granularity or config.unit_granularity)
        missing = [name for name in expected if name not in given.sparsity]
        unknown = [name for name in given.sparsity if name not in expected]
        raise ValueError(
            f"The allocation does not fit the model: it lacks {missing[:3] or 'nothing'} and names "
            f"{unknown[:3] or 'nothing'} that the model does not have."
        )
    units = architecture.units(granularity)
    sizes = {name: sum(weight.size for weight in weights) for name, weights in units.items()}
    mean = sum(given.sparsity[name] * size for name, size in sizes.items()) / sum(sizes.values())
    # A file of rounded shares may be off in the fourth digit; more is another target.
    if abs(mean - config.sparsity) > 5e-4:
        raise ValueError(
            f"The allocation's mean sparsity is {mean:.4f}, but the config asks for {config.sparsity}; "
            f"use sparsity={mean:.4f}."
        )
    low = min(config.min_sparsity, *given.sparsity.values())
    high = max(config.max_sparsity, *given.sparsity.values())
    return fit_to_pattern(
        fit_to_budget(given.sparsity, sizes, config.sparsity, low, high, given.name, granularity), config
    )


def check_finite_weights(model: nn.Module, architecture: Architecture) -> None:
    """Raise `ValueError` for a NaN or infinity in a weight, by name."""
    for walked in walk_blocks(model, architecture, None):
        for weight in walked.weights:
            tensor: Tensor = walked.tensor(weight)
            if not tensor.isfinite().all():
                raise ValueError(f"{weight.name} holds NaN or infinities; the checkpoint is damaged or overflowed.")
