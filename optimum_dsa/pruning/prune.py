"""The straight line: model + inputs -> allocation -> steps over the blocks -> pruned model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..model.architecture import Architecture
from ..model.parameters import count_parameters
from ..model.statistics import CollectedStatistics
from ..model.walk import walk_blocks
from .allocate import allocate, architecture_for, check_finite_weights
from .allocation import Allocation
from .configuration import DSAConfig
from .reconstruct import Reconstruct
from .report import PruningReport
from .sink import KeepBlocks, Sink
from .source import Known, Source, as_calibration, batches_of, check_finite_outputs, progress
from .steps import RemoveWeights, Step, union


logger = logging.getLogger(__name__)


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
    calibration = as_calibration(calibration, model)
    architecture = architecture_for(model, config)
    if config.update.true_sequential and isinstance(calibration, CollectedStatistics):
        raise ValueError("true_sequential collects statistics anew, and these are there already; give text instead.")
    # Missing data are found before work.
    if config.resolved.reads:
        batches_of(calibration, config, f"method {config.method!r}")
    if config.reconstruct.steps:
        batches_of(calibration, config, "training of blocks (reconstruct)", Reconstruct.reads)
    check_finite_weights(model, architecture)
    check_finite_outputs(model, architecture, calibration)
    # A walk of its own, before the one that prunes: units are compared on the dense model.
    allocation = allocate(model, calibration, config, architecture)
    remove = RemoveWeights(config.resolved, allocation, config.update.true_sequential)
    steps: list[Step] = [remove]
    reconstruct = Reconstruct(config.reconstruct, config.data.seed)
    if config.reconstruct.steps:
        steps.append(reconstruct)
    sink = KeepBlocks()
    run_steps(model, architecture, calibration, config, steps, sink)
    _warn_of_more(sum(sink.zeros.values()), allocation, config)
    return PruningReport(
        config=config,
        allocation=allocation,
        # Counted in the weights, and not what was asked for: some were zero before, or became so.
        achieved={
            unit: sum(sink.zeros[weight.name] for weight in weights) / allocation.sizes[unit]
            for unit, weights in architecture.units(allocation.granularity).items()
        },
        parameters=count_parameters(model),
        calibration=calibration.facts() if calibration else None,
        dense=architecture.dense,
        damping=remove.damping,
        unseen=tuple(remove.unseen),
        reconstruction=reconstruct.found,
        seconds=time.perf_counter() - start,
    )


def _warn_of_more(zeros: int, allocation: Allocation, config: DSAConfig) -> None:
    """Say that more weights are zero than were asked for: those that were zero before and had to stay."""
    more = zeros - sum(allocation.counts().values())
    if more > 0:
        logger.warning(
            "%d weights more than asked are zero: the model had zeros that fit neither allocation nor pattern %s.",
            more,
            config.resolved.pattern,
        )


def run_steps(
    model: nn.Module,
    architecture: Architecture,
    calibration: Known | None,
    config: DSAConfig,
    steps: Sequence[Step],
    sink: Sink,
) -> None:
    """The body of every one-shot pruner: each block in turn is given to all steps, then to the sink."""
    reads = union(steps)
    # of statistics, and not of what the dense block gives alone
    readers = [step for step in steps if step.reads - {"outputs"}]
    batches = batches_of(calibration, config, f"method {config.method!r}", reads) if reads else None
    for walked in walk_blocks(
        model,
        architecture,
        batches,
        reads=reads,
        sequential=config.sequential,
        progress=progress("Pruning"),
        true_sequential=bool(readers) and all(getattr(step, "true_sequential", False) for step in readers),
    ):
        for number, step in enumerate(steps):
            step(replace(walked, needed=any(other in readers for other in steps[number + 1 :])))
        sink(walked)
        # The statistics of one block, and not of two: the next one's are collected before the name is another's.
        del walked
