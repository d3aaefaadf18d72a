"""The straight line: model + inputs -> allocation -> masks -> pruned model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..common.progress import progress
from ..data import Calibration, load_calibration
from ..model.architecture import Architecture, Weight, find_architecture
from ..model.calls import feed
from ..model.parameters import count_parameters
from ..model.statistics import CollectedStatistics, LayerStatistics
from ..model.walk import WalkedBlock, walk_blocks
from .allocation import Allocation, Unit, fit_to_budget, fit_to_levels, fit_to_matrices, split_count
from .configuration import DSAConfig
from .report import PruningReport
from .unstructured.metrics import METRICS
from .unstructured.patterns import Pattern
from .unstructured.updates import UPDATES, Choice


logger = logging.getLogger(__name__)

Known = Calibration | CollectedStatistics  # what statistics come from, or are
Source = Known | Tensor | Mapping[str, Tensor]


def architecture_for(model: nn.Module, config: DSAConfig) -> Architecture:
    """What `config` prunes in `model`; raises where its pattern does not fit a weight."""
    found = find_architecture(model, config.blocks, config.exclude, config.include, config.skip_unprunable)
    pattern = Pattern.parse(config.recipe.pattern)
    for weight in found.weights:
        pattern.check(weight.name, weight.shape[1])
    return found


def allocation_needs_inputs(config: DSAConfig) -> bool:
    """Whether the allocation is computed from calibration data."""
    return _allocation_reads(config) != "nothing"


def pruning_needs_inputs(config: DSAConfig) -> bool:
    """Whether scores or updates are computed from calibration data."""
    return _pruning_reads(config) != "nothing"


def needs_gram(config: DSAConfig) -> bool:
    """Whether scores, updates or the allocation are computed from X·Xᵀ."""
    return "gram" in (_allocation_reads(config), _pruning_reads(config))


def _allocation_reads(config: DSAConfig) -> str:
    """What the allocation needs of calibration: "nothing", "inputs" or "gram"."""
    reads = getattr(config.allocator, "reads", "nothing")
    return METRICS.fact(config.allocation_metric, "reads", "inputs") if reads == "scores" else reads


def _pruning_reads(config: DSAConfig) -> str:
    """What scores and updates need of calibration: "nothing", "inputs" or "gram"."""
    recipe = config.recipe
    metric, update = METRICS.fact(recipe.metric, "reads", "inputs"), UPDATES.fact(recipe.update, "reads", "nothing")
    return "gram" if "gram" in (metric, update) else metric


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
    calibration = _as_calibration(calibration, model)
    architecture = architecture or architecture_for(model, config)
    units = architecture.units(config.unit_granularity)
    sizes = {name: sum(weight.size for weight in weights) for name, weights in units.items()}
    if config.allocator is None:
        allocation = _given(config, architecture)
    else:
        measured = _measure(model, architecture, calibration, config)
        wanted = config.allocator.wish({name: measured[name] for name in units}, config.sparsity, config.spread)
        bounds = (config.min_sparsity, config.max_sparsity)
        allocation = fit_to_budget(wanted, sizes, config.sparsity, *bounds, name=str(config.allocation))
        matrices = {name: [weight.size for weight in weights] for name, weights in units.items()}
        allocation = fit_to_matrices(allocation, matrices, *bounds)
        if config.allocator.reads != "nothing" and config.spread != 0 and len(set(wanted.values())) == 1 < len(units):
            logger.warning(
                "Allocation %s does not tell the units of this model apart: all get %g, as with uniform.",
                config.allocation,
                config.sparsity,
            )
    return fit_to_pattern(allocation, config)


def fit_to_pattern(allocation: Allocation, config: DSAConfig) -> Allocation:
    """The allocation that the pattern of `config` can follow: itself, or with N:M rounded to whole N in every unit."""
    pattern = Pattern.parse(config.recipe.pattern)
    return fit_to_levels(allocation, pattern.width) if pattern.kind in ("mixed", "n:m") else allocation


def _measure(
    model: nn.Module,
    architecture: Architecture,
    calibration: Known | None,
    config: DSAConfig,
) -> dict[str, object]:
    """The allocator's heavy half, for every unit."""
    allocator = config.allocator
    batches = None
    if allocation_needs_inputs(config):
        batches = _batches(calibration, config, f"allocation {config.allocation!r}")
    gram = _allocation_reads(config) == "gram"
    measured = {}
    for walked in walk_blocks(
        model, architecture, batches, gram=gram, sequential=False, progress=_progress("Allocating")
    ):
        for name, weights in _units_of(walked, config.unit_granularity).items():
            unit = Unit(
                name,
                walked.block.depth,
                [walked.tensor(weight) for weight in weights],
                [walked.statistics.get(weight.name) for weight in weights],
                METRICS[config.allocation_metric],
            )
            measured[name] = allocator.measure(unit)
    return measured


def _units_of(walked: WalkedBlock, granularity: str) -> dict[str, Sequence[Weight]]:
    if granularity == "matrix":
        return {weight.name: (weight,) for weight in walked.weights}
    return {walked.name: walked.weights} if walked.weights else {}


def _given(config: DSAConfig, architecture: Architecture) -> Allocation:
    """The user's own allocation, held against the model and the target."""
    given = config.given_allocation()
    for granularity in (config.unit_granularity, "block", "matrix"):
        units = architecture.units(granularity)
        if units.keys() == given.sparsity.keys():
            break
    else:
        expected = architecture.units(config.unit_granularity)
        missing = [name for name in expected if name not in given.sparsity]
        unknown = [name for name in given.sparsity if name not in expected]
        raise ValueError(
            f"The allocation does not fit the model: it lacks {missing[:3] or 'nothing'} and names "
            f"{unknown[:3] or 'nothing'} that the model does not have."
        )
    sizes = {name: sum(weight.size for weight in weights) for name, weights in units.items()}
    mean = sum(given.sparsity[name] * size for name, size in sizes.items()) / sum(sizes.values())
    if abs(mean - config.sparsity) > 5e-4:
        raise ValueError(
            f"The allocation's mean sparsity is {mean:.4f}, but the config asks for {config.sparsity}; "
            f"use sparsity={mean:.4f}."
        )
    low = min(config.min_sparsity, *given.sparsity.values())
    high = max(config.max_sparsity, *given.sparsity.values())
    return fit_to_budget(given.sparsity, sizes, config.sparsity, low, high, given.name)


@torch.no_grad()
def prune(model: nn.Module, calibration: Source | None, config: DSAConfig) -> PruningReport:
    """Prune `model` in place; what was asked and what came out.

    Args:
        calibration (`Calibration | CollectedStatistics | Tensor | Mapping[str, Tensor]`): a LongTensor (samples,
            length), the model's inputs by name, what `load_calibration` gives, or statistics that are there already;
            `None` where method and allocation need no data.

    Everything that can be known to be wrong is raised before the first weight is changed.
    """
    start = time.perf_counter()
    calibration = _as_calibration(calibration, model)
    architecture = architecture_for(model, config)
    batches = None
    if pruning_needs_inputs(config):
        batches = _batches(calibration, config, f"method {config.method!r}")
    check_finite(model, architecture, calibration)
    allocation = allocate(model, calibration, config, architecture)
    granularity = "block" if allocation.sizes.keys() == architecture.units("block").keys() else "matrix"
    gram = _pruning_reads(config) == "gram"
    counts = allocation.counts()
    zeros: dict[str, int] = {}
    damping: dict[str, float] = {}
    unseen = []
    for walked in walk_blocks(
        model, architecture, batches, gram=gram, sequential=config.sequential, progress=_progress("Pruning")
    ):
        for unit, weights in _units_of(walked, granularity).items():
            shares = split_count(counts[unit], {weight.name: weight.size for weight in weights})
            for weight in weights:
                tensor, statistics = walked.tensor(weight), walked.statistics.get(weight.name)
                prune_(tensor, statistics, config, shares[weight.name])
                walked.changed(weight)
                zeros[unit] = zeros.get(unit, 0) + int((tensor == 0).sum())
                if statistics is not None and statistics.tokens == 0:
                    unseen.append(weight.name)
                if statistics is not None and (used := statistics.damping_used) and used > config.damping:
                    damping[weight.name] = used
    return PruningReport(
        config=config,
        allocation=allocation,
        achieved={unit: zeros[unit] / size for unit, size in allocation.sizes.items()},
        parameters=count_parameters(model),
        calibration=calibration.facts() if calibration else None,
        dense=architecture.dense,
        damping=damping,
        unseen=tuple(unseen),
        seconds=time.perf_counter() - start,
    )


def prune_(weight: Tensor, statistics: LayerStatistics | None, config: DSAConfig, count: int) -> None:
    """Remove `count` weights of one matrix, (out_features, in_features), in place."""
    weight.copy_(pruned(weight, statistics, config, count))


def pruned(weight: Tensor, statistics: LayerStatistics | None, config: DSAConfig, count: int) -> Tensor:
    """A matrix, (out_features, in_features), without `count` of its weights, and with what makes up for them."""
    recipe = config.recipe
    pattern = Pattern.parse(recipe.pattern)
    choice = Choice(pattern, count, None, config.damping)
    if not (recipe.metric == "obs" and recipe.update == "sparsegpt" and choice.as_it_goes):
        keep = pattern.keep(METRICS[recipe.metric](weight, statistics), count)
        choice = Choice(pattern, count, keep, config.damping)
    return UPDATES[recipe.update](weight, statistics, choice)


def check_finite(model: nn.Module, architecture: Architecture, calibration: Known | None) -> None:
    """Raise `ValueError` for a NaN or infinity in a weight, or in what a block makes of the first sample, by name."""
    for walked in walk_blocks(model, architecture, None):
        for weight in walked.weights:
            if not walked.tensor(weight).isfinite().all():
                raise ValueError(f"{weight.name} holds NaN or infinities; the checkpoint is damaged or overflowed.")
    if not isinstance(calibration, Calibration):
        return
    handles = []

    def check(name: str):
        def hook(module, args, output):
            hidden = output if isinstance(output, Tensor) else output[0]
            if not hidden.isfinite().all():
                raise ValueError(
                    f"The output of {name} holds NaN or infinities on the first calibration sample; "
                    "try another dtype (bfloat16 or float32)."
                )

        return hook

    try:
        for stack in architecture.stacks:
            for block in stack.blocks:
                module = model.get_submodule(block.name)
                handles.append(module.register_forward_hook(check(block.name)))
        feed(model, calibration.batches(1)[0])
    finally:
        for handle in handles:
            handle.remove()


def _as_calibration(source: Source | None, model: nn.Module) -> Known | None:
    known = source is None or isinstance(source, (Calibration, CollectedStatistics))
    return source if known else load_calibration(source, model)


def _batches(calibration: Known | None, config: DSAConfig, who: str) -> list[dict[str, Tensor]] | CollectedStatistics:
    if calibration is None:
        raise ValueError(f"The {who} needs calibration data; pass texts, a file, a dataset or tokens.")
    return calibration.batches(config.batch_size) if isinstance(calibration, Calibration) else calibration


def _progress(description: str):
    """Shows how many blocks are done; silenced by the Hugging Face switches."""
    return lambda blocks: progress(blocks, description, "block", "optimum_dsa.prune")
