"""The straight line: model + inputs -> allocation -> steps over the blocks -> pruned model."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.ranks import ALONE, Ranks, current_ranks
from ..model.activations import held_in, spilled_to
from ..model.adapters import has_adapters, inner_model, without_adapters
from ..model.architecture import Architecture
from ..model.gradients import check_loss_reaches
from ..model.offload import is_offloaded
from ..model.parameters import count_parameters
from ..model.statistics import CollectedStatistics
from ..model.walk import WalkedBlock, walk_blocks
from .allocate import allocate, architecture_for, say_dense, standing_zeros
from .allocation import Allocation
from .configuration import DSAConfig
from .distill import check_predicts, distillation_of
from .divided import SharedBlocks, check_alike, check_divisible
from .finished import FinishedBlocks, settings_of
from .permute import Permute
from .reconstruct import Reconstruct
from .report import PruningReport, plain_report
from .sections import ValuesConfig
from .sink import KeepBlocks, Sink
from .source import Known, Source, as_calibration, batches_of, batches_to_train, check_finite_outputs, progress
from .steps import RemoveWeights, Step, union
from .zeros import zeros_in


logger = logging.getLogger(__name__)


@torch.no_grad()
def prune(
    model: nn.Module,
    calibration: Source | None,
    config: DSAConfig,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> PruningReport:
    """Prune `model` in place; what was asked and what came out.

    Args:
        calibration (`Calibration | CollectedStatistics | Tensor | Mapping[str, Tensor]`): a LongTensor (samples,
            length), the model's inputs by name, what `load_calibration` gives, or statistics that are there already;
            `None` where method and allocation need no data.
        checkpoints (`str | Path`, *optional*): folder for the blocks that are finished, from which a prune that was
            interrupted goes on; as large as the blocks in the end.
        resume (`bool`, defaults to `False`): go on from those that are there, with `model` as it was at the beginning;
            the end is that of an uninterrupted run.
        ranks (`Ranks`): processes that prune together, each of which calls this with the same; all have the pruned
            model in the end, with the bits that one process gives it. Checkpoints are the first one's.

    Of a model with adapters, what is under them is pruned, as it runs without them, and they are left alone.

    Everything that can be known to be wrong is raised before the first weight is changed.
    """
    with ranks.together():
        return _prune_inner(model, calibration, config, checkpoints, resume, ranks)


def prune_with_others(
    model: nn.Module,
    calibration: Source | None,
    config: DSAConfig,
    checkpoints: str | Path | None = None,
    resume: bool = False,
) -> PruningReport:
    """`prune`, with the processes that `torchrun` or `accelerate launch` started beside this one, if any."""
    return prune(model, calibration, config, checkpoints, resume, current_ranks())


def _prune_inner(
    model: nn.Module,
    calibration: Source | None,
    config: DSAConfig,
    checkpoints: str | Path | None,
    resume: bool,
    ranks: Ranks,
) -> PruningReport:
    """`prune` of what is under adapters, if there are any."""
    check_divisible(config, ranks)
    if not has_adapters(model):
        with spilled_to(checkpoints):
            return _prune(model, calibration, config, checkpoints, resume, ranks)
    if is_offloaded(model):
        raise ValueError(
            "Under adapters a model is pruned in memory; load it without offloading, or without adapters."
        )
    with without_adapters(model), spilled_to(checkpoints):
        return plain_report(_prune(inner_model(model), calibration, config, checkpoints, resume, ranks))


def _prune(
    model: nn.Module,
    calibration: Source | None,
    config: DSAConfig,
    checkpoints: str | Path | None,
    resume: bool,
    ranks: Ranks,
) -> PruningReport:
    start = time.perf_counter()
    config.check_settled()
    calibration = as_calibration(calibration, model)
    architecture = architecture_for(model, config)
    say_dense(model, architecture, bool(config.blocks))
    _check_calibration(model, calibration, config)
    check_alike(model, calibration, config, ranks)
    standing = standing_zeros(model, architecture, config)
    check_finite_outputs(model, architecture, calibration)
    finished = _finished(model, architecture, calibration, config, checkpoints, resume, ranks)
    allocation = finished.allocation if finished else None
    if allocation is None:
        # A walk of its own, before the one that prunes: units are compared on the dense model.
        allocation = allocate(model, calibration, config, architecture, standing, ranks)
    if finished:
        finished.begin(allocation)
    remove = RemoveWeights(config.resolved, allocation, config.update.true_sequential, ranks)
    # First of all: what follows sees the channels in the order in which they are saved.
    permute = [Permute(config.resolved, allocation, config.permute)] if config.permute else []
    steps: list[Step] = [*permute, remove]
    reconstruct = Reconstruct(config.reconstruct, config.data.seed, config.values.bits)
    if config.reconstruct.steps:
        steps.append(reconstruct)
    distillation = distillation_of(model, architecture, calibration, config, config.values.bits)
    sink = KeepBlocks()
    run_steps(model, architecture, calibration, config, steps, sink, finished, ranks)
    distilled = distillation(architecture) if distillation else {}
    for weight in architecture.weights if distilled else ():
        sink.zeros[weight.name] = zeros_in(weight.tensor(model))
    for step in permute:
        step.log()
    remove.log(architecture.weights)
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
        permuted=permute[0].permuted if permute else {},
        reconstruction=reconstruct.found,
        seconds=time.perf_counter() - start,
        zeros_before=standing,
        dense_sizes=architecture.dense_sizes,
        distillation=distilled,
        divided=not ranks.alone,
    )


def _check_calibration(model: nn.Module, calibration: Known | None, config: DSAConfig) -> None:
    """Raise `ValueError` where what `config` asks for cannot be had from this model and these data."""
    if config.update.true_sequential and isinstance(calibration, CollectedStatistics):
        raise ValueError("true_sequential collects statistics anew, and these are there already; give text instead.")
    if config.permute and isinstance(calibration, CollectedStatistics):
        raise ValueError(
            f"permute={config.permute!r} compares what the model gives before and after, and statistics give nothing "
            "to run it on; give text instead, or leave permute out."
        )
    # Missing data are found before work.
    if config.resolved.reads:
        alone = replace(config, values=ValuesConfig()).resolved.reads
        who = f"method {config.method!r}" if alone else f"grid of values {config.values.name!r}"
        batches_of(calibration, config, who)
    if "gradients" in config.resolved.reads | config.resolved.allocation_reads:
        check_loss_reaches(model)
    if config.reconstruct.asked:
        batches_to_train(calibration, config)
        config.reconstruct.check_place(is_offloaded(model))
    if config.reconstruct.distill:
        check_predicts(model)


def _finished(
    model: nn.Module,
    architecture: Architecture,
    calibration: Known | None,
    config: DSAConfig,
    checkpoints: str | Path | None,
    resume: bool,
    ranks: Ranks,
) -> FinishedBlocks | SharedBlocks | None:
    """What an earlier run finished, and where this one's blocks go; `None` where they are not kept."""
    if not ranks.of_first(checkpoints is not None):
        if resume:
            raise ValueError("Resuming needs a folder of checkpoints; name one.")
        return None
    own = None
    if ranks.is_first:
        names = [block.name for block in architecture.blocks]
        given = config.given_allocation() if config.allocator is None else None
        own = FinishedBlocks.open(checkpoints, resume, settings_of(model, calibration, config, given), names)
    return own if ranks.alone else SharedBlocks(own, ranks)


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
    finished: FinishedBlocks | SharedBlocks | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """The body of every one-shot pruner: each block in turn is given to all steps, then to the sink.

    Blocks that are `finished` are put back instead, and those that are not are kept there as they become so.
    """
    reads = union(steps)
    # of statistics, and not of what the dense block gives alone
    readers = [step for step in steps if step.reads - {"outputs"}]
    batches, unseen = None, 0
    if "outputs" in reads or (reads and config.reconstruct.asked):
        batches, unseen = batches_to_train(calibration, config)
    elif reads:
        batches = batches_of(calibration, config, f"method {config.method!r}")
    done = _whole(architecture, finished.count, config.reconstruct.span) if finished else 0
    blocks = walk_blocks(
        model,
        architecture,
        batches,
        reads=reads,
        sequential=config.sequential,
        progress=progress("Pruning", not ranks.is_first),
        true_sequential=bool(readers) and all(getattr(step, "true_sequential", False) for step in readers),
        finished=done,
        unseen=unseen,
        held=held_in(config.activations),
        ranks=ranks,
    )
    held: list[tuple[int, WalkedBlock, list[dict[str, Any]]]] = []
    for number, walked in enumerate(blocks):
        if number < done:
            finished.restore(number, walked, steps)
            sink(walked)
            continue
        known = [set(step.notes) for step in steps]
        for place, step in enumerate(steps):
            step(replace(walked, needed=any(other in readers for other in steps[place + 1 :])))
        # Of one block, and not of two: the next one's are collected while this one still has a name.
        walked.statistics.clear()
        held.append((number, walked, [_new(step.notes, old) for step, old in zip(steps, known)]))
        if any(getattr(step, "waiting", ()) for step in steps):
            continue
        for number, block, notes in held:
            if finished:
                finished.add(number, block, notes)
            sink(block)
        held.clear()


def _new(notes: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    return {name: note for name, note in notes.items() if name not in known}


def _whole(architecture: Architecture, count: int, span: int) -> int:
    """How many of the first `count` blocks are all of those that are trained together, `span` at a time."""
    start = 0
    for stack in architecture.stacks:
        if count < start + len(stack.blocks):
            return count - (count - start) % span
        start += len(stack.blocks)
    return count
