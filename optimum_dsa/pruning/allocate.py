"""Statistics -> the sparsity of every unit, at exactly the budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from ..common.ranks import ALONE, Ranks
from ..model.activations import held_in
from ..model.architecture import Architecture, Weight, find_architecture
from ..model.left_dense import LARGE, excluding, share_of, told
from ..model.offload import is_offloaded
from ..model.stacks import other_stacks
from ..model.walk import WalkedBlock, reads_of, walk_blocks
from .allocation import Allocation, Seen, Unit, fit_to_budget, fit_to_levels, fit_to_matrices
from .calibration import Calibration
from .configuration import DSAConfig
from .other_head import allocation_for
from .overrides import given_shares, named_in, sparsity_of_rest, with_given, without
from .source import Known, Source, as_calibration, batches_of, progress
from .unstructured.metrics import METRICS
from .zeros import FEWEST_ZEROS, count_zeros, zeros_in


logger = logging.getLogger(__name__)

# Shares that are typed or read may be off in the fourth digit; more is another target.
ROUNDED = 5e-4


def architecture_for(model: nn.Module, config: DSAConfig) -> Architecture:
    """What `config` prunes in `model`; raises where its pattern does not fit a weight, or `still` names none."""
    found = find_architecture(model, config.blocks, config.exclude, config.include, config.skip_unprunable)
    pattern = config.resolved.pattern
    unfit = {weight.name: weight for weight in found.weights if not pattern.fits(weight.shape[1])}
    if unfit:
        sizes = {name: weight.size for name, weight in unfit.items()}
        rest = sum(weight.size for weight in found.weights) - sum(sizes.values()) + sum(found.dense_sizes.values())
        name, weight = next(iter(unfit.items()))
        raise ValueError(
            f"{name}: pattern {pattern} needs in_features divisible by {pattern.width}, got {weight.shape[1]}; leave "
            f"it dense, and those like it, with exclude={excluding(unfit)} ({told(sizes, rest)}), or choose another "
            "pattern."
        )
    for name in config.update.still:
        named_in(found, name, "still")
    return found


def say_dense(model: nn.Module, architecture: Architecture, chosen: bool) -> None:
    """Warn, once, where a large part of the blocks stays dense: a sparsity is that of the rest.

    So do the blocks of other towers, unless the user has `chosen` which are pruned.
    """
    # A head that is pruned as well is none of the blocks, of which the shares are told.
    within = (weight for stack in architecture.stacks for block in stack.blocks for weight in block.weights)
    prunable, sizes = sum(weight.size for weight in within), architecture.dense_sizes
    if share_of(sizes, prunable) >= LARGE:
        why = ", ".join(sorted(set(architecture.dense.values())))
        _warn_once(f"Stays dense ({why}): {told(sizes, prunable)}; the sparsity is that of the rest.")
    others = {} if chosen else other_stacks(model, [stack.name for stack in architecture.stacks])
    if share_of(others, prunable) >= LARGE:
        _warn_once(f"Other blocks stay dense: {told(others, prunable)}; name those to prune with blocks (--blocks).")


@cache
def _warn_once(message: str) -> None:
    """Warn, but not again at every step of a schedule, or for every model of the same make."""
    logger.warning("%s", message)


@torch.no_grad()
def allocate(
    model: nn.Module,
    calibration: Source | None,
    config: DSAConfig,
    architecture: Architecture | None = None,
    standing: Mapping[str, int] | None = None,
    ranks: Ranks = ALONE,
) -> Allocation:
    """The sparsity of every unit of `model`, from its weights as they are; nothing is changed.

    Args:
        calibration (`Source`, *optional*): as in `prune`; it may be `None` where the allocation needs no data.
        standing (`Mapping[str, int]`, *optional*): what `standing_zeros` gives, where it is known already.
        ranks (`Ranks`): processes that do this together, each with the same model and all of the data.

    Raises:
        ValueError: calibration data are needed and missing, or the budget cannot be met.
    """
    config.check_settled()
    calibration = as_calibration(calibration, model)
    architecture = architecture or architecture_for(model, config)
    standing = standing_zeros(model, architecture, config) if standing is None else standing
    if config.overrides:
        shares = given_shares(architecture, config.overrides)
        left, rest = sparsity_of_rest(config, architecture, shares, standing), without(architecture, shares)
        found = None
        if left is not None:
            found = _allocate(model, calibration, replace(config, sparsity=left, overrides=()), rest, standing, ranks)
        floors = standing if config.resolved.keeps_zeros_in_number else {}
        return with_given(found, architecture, rest, shares, floors)
    return _allocate(model, calibration, config, architecture, standing, ranks)


def _allocate(
    model: nn.Module,
    calibration: Known | None,
    config: DSAConfig,
    architecture: Architecture,
    standing: Mapping[str, int],
    ranks: Ranks,
) -> Allocation:
    """`allocate` for what is in `architecture`."""
    if config.allocator is None:
        return _given(config, architecture, standing)
    measured = _measure(model, architecture, calibration, config, ranks)
    proposed = config.allocator.propose(measured, config.sparsity, config.spread)
    # It looks like a result: without a word one would believe that the allocation was computed.
    if config.allocator.reads != "nothing" and config.spread != 0 and len(set(proposed.values())) == 1 < len(measured):
        logger.warning(
            "Allocation %s does not tell the units of this model apart: all get %g, as with uniform.",
            config.allocation,
            config.sparsity,
        )
    return fit(proposed, architecture, config, config.unit_granularity, str(config.allocation), standing)


def fit(
    proposed: dict[str, float],
    architecture: Architecture,
    config: DSAConfig,
    granularity: str,
    name: str = "custom",
    standing: Mapping[str, int] | None = None,
) -> Allocation:
    """What units ask for, brought to the config's budget, bounds and pattern: what `prune` will remove, to one weight.

    Args:
        proposed (`dict[str, float]`): unit -> sparsity, of every unit of `architecture` at `granularity`.
        standing (`Mapping[str, int]`, *optional*): what `standing_zeros` gives: no unit gets less.
    """
    units = architecture.units(granularity)
    matrices = {unit: [weight.size for weight in weights] for unit, weights in units.items()}
    sizes = {unit: sum(parts) for unit, parts in matrices.items()}
    bounds = (config.min_sparsity, config.max_sparsity)
    floors = floors_of(units, config, standing)
    found = fit_to_budget(proposed, sizes, config.sparsity, *bounds, name, granularity, floors)
    return fit_to_pattern(fit_to_matrices(found, matrices, *bounds, floors), config)


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
    ranks: Ranks,
) -> dict[str, object]:
    """The allocator's heavy half, for every unit of the config's granularity."""
    method = config.resolved
    if config.allocator.reads == "model":
        return config.allocator.measure_model(seen_by_allocator(model, architecture, calibration, config))
    batches = None
    if method.allocation_reads:
        batches = batches_of(calibration, config, f"allocation {config.allocation!r}")
    measured, held = {}, []
    # A block for each process, then all at once: not where blocks come and go, or their statistics are large.
    ahead = 1 if "gram" in method.allocation_reads or is_offloaded(model) else ranks.count
    for walked in walk_blocks(
        model,
        architecture,
        batches,
        reads=method.allocation_reads,
        # One pass a block: nothing is changed here, so that its outputs are the same either way.
        sequential=False,
        progress=progress("Allocating", not ranks.is_first),
        held=held_in(config.activations),
        ranks=ranks,
    ):
        held.append(walked)
        # The statistics of one block, and not of two: the next one's are collected before the name is another's.
        del walked
        if len(held) == ahead:
            measured |= _measure_blocks(held, config, ranks)
    return measured | _measure_blocks(held, config, ranks)


def _measure_blocks(held: list[WalkedBlock], config: DSAConfig, ranks: Ranks) -> dict[str, object]:
    """The same of the units of the blocks that are `held`, which are let go; of several each process measures one."""
    if len(held) <= 1:
        return _measure_block(held.pop(), config) if held else {}
    own = _measure_block(held[ranks.index], config) if ranks.index < len(held) else {}
    held.clear()
    return {name: value for each in ranks.gather(own) for name, value in each.items()}


def seen_by_allocator(
    model: nn.Module, architecture: Architecture, calibration: Known | None, config: DSAConfig
) -> Seen:
    """What an allocator that runs the model is given.

    Raises:
        ValueError: there is no text to run it on, or some of its weights are elsewhere.
    """
    who = f"allocation {config.allocation!r}"
    batches_of(calibration, config, who)
    if not isinstance(calibration, Calibration):
        raise ValueError(f"The {who} runs the model on text, and these statistics are there already; give text.")
    if is_offloaded(model):
        raise ValueError(
            f"The {who} runs the model again and again with other weights, and some are elsewhere (offloaded); load "
            "it without offloading, or choose one that reads statistics, such as 'owl'."
        )

    def batches(size: int, samples: int | None) -> list[dict[str, Tensor]]:
        found = calibration.batches(min(size, config.batch_size))
        return found if samples is None else found[: max(samples // min(size, config.batch_size), 1)]

    reads = reads_of(METRICS.fact(config.allocation_metric, "reads", "inputs")) | reads_of("inputs")
    pattern, metric = config.resolved.pattern, config.resolved.allocation_metric
    return Seen(model, architecture, batches, config.sparsity, config.unit_granularity, metric, reads, pattern)


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


def _given(config: DSAConfig, architecture: Architecture, standing: Mapping[str, int]) -> Allocation:
    """The user's own allocation, held against the model and the target."""
    given = allocation_for(architecture, config.given_allocation())
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
    if abs(mean - config.sparsity) > ROUNDED:
        raise ValueError(
            f"The allocation's mean sparsity is {mean:.4f}, but the config asks for {config.sparsity}; "
            f"use sparsity={mean:.4f}."
        )
    _check_given(config, given, granularity, sizes)
    low = min(config.min_sparsity, *given.sparsity.values())
    high = max(config.max_sparsity, *given.sparsity.values())
    floors = floors_of(units, config, standing)
    fuller = [unit for unit, zeros in floors.items() if zeros > (given.sparsity[unit] + ROUNDED) * sizes[unit]]
    if fuller:
        logger.warning(
            "The allocation asks for less than is zero already in %d of %d units, such as %s (%.4f, and %.4f is): "
            "these keep their zeros, and the others lose less, so that the mean is met.",
            len(fuller),
            len(units),
            fuller[0],
            given.sparsity[fuller[0]],
            floors[fuller[0]] / sizes[fuller[0]],
        )
    return fit_to_pattern(
        fit_to_budget(given.sparsity, sizes, config.sparsity, low, high, given.name, granularity, floors), config
    )


def _check_given(config: DSAConfig, given: Allocation, granularity: str, sizes: Mapping[str, int]) -> None:
    """Raise `ValueError` where a user's own allocation is of other weights, or of other units than he asks for."""
    # Sizes are none where they were not written.
    odd = next((unit for unit, size in sizes.items() if given.sizes[unit] not in (0, size)), None)
    if odd is not None:
        raise ValueError(
            f"The allocation does not fit the model: it is for {given.sizes[odd]:,} weights of {odd}, and "
            f"{sizes[odd]:,} are pruned here; it is of another model, or of other exclude, include or blocks: "
            "give the same, or an allocation without sizes."
        )
    if config.spread is not None:
        raise ValueError(
            f"spread={config.spread:g} is for an allocation that is computed; one that is given has every unit's "
            "sparsity. Leave it out, or name an allocation, such as 'owl'."
        )
    if config.granularity not in (type(config).granularity, granularity):
        raise ValueError(
            f"granularity={config.granularity!r} is for an allocation that is computed; the one that is given is per "
            f"{granularity}. Leave it out."
        )


def floors_of(
    units: Mapping[str, tuple[Weight, ...]], config: DSAConfig, standing: Mapping[str, int] | None
) -> dict[str, int]:
    """Unit -> the zeros that it has before, and keeps; empty where the pattern alone says how many go."""
    if not standing or config.resolved.pattern.sparsity is not None:
        return {}
    return {unit: sum(standing.get(weight.name, 0) for weight in weights) for unit, weights in units.items()}


@torch.no_grad()
def standing_zeros(model: nn.Module, architecture: Architecture, config: DSAConfig) -> dict[str, int]:
    """Matrix -> how many of its weights are zero before and stay so, of those that have any; empty with `revive`.

    Raises:
        ValueError: a NaN or infinity in a weight, by name; or more weights are zero than `config` asks for, which
            counts them, and its pattern is no N:M, whose number is the least of every group.
    """
    found: dict[str, int] = {}
    for walked in walk_blocks(model, architecture, None):
        for weight in walked.weights:
            tensor: Tensor = walked.tensor(weight)
            if not tensor.isfinite().all():
                raise ValueError(f"{weight.name} holds NaN or infinities; the checkpoint is damaged or overflowed.")
            if zeros := zeros_in(tensor):
                found[weight.name] = zeros
    total, zeros = sum(weight.size for weight in architecture.weights), sum(found.values())
    # A few weights of a dense model are zero by chance, whatever is asked of it.
    more = zeros > max(config.sparsity + ROUNDED, FEWEST_ZEROS) * total
    if more and config.resolved.pattern.sparsity is None:
        raise ValueError(
            f"{zeros:,} of {total:,} prunable weights are zero already ({zeros / total:.4f}), and a sparsity of "
            f"{config.sparsity:g} counts them; ask for {math.ceil(1e4 * zeros / total) / 1e4:g} or more."
        )
    return {} if config.revive else found


def check_dense(model: nn.Module, config: DSAConfig, work: str) -> None:
    """Raise `ValueError` where weights that `config` prunes are gone already, of which `work` would know nothing."""
    architecture = architecture_for(model, config)
    zeros = sum(count_zeros(model, architecture).values())
    share = zeros / max(sum(weight.size for weight in architecture.weights), 1)
    if share >= FEWEST_ZEROS:
        raise ValueError(
            f"{type(model).__name__} is pruned already: {share:.2%} of its prunable weights are zero, and {work} "
            "would take it for a dense model. Give it the dense model that this one was made from."
        )
