"""A model made smaller: structures found, chosen, silenced while the blocks are walked, and cut out in the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...model.architecture import find_architecture
from ...model.inputs import own_settings_of
from ...model.parameters import count_parameters
from ..allocation import Allocation
from ..calibration import Calibration
from ..distill import distillation_of
from ..finished import FinishedBlocks, settings_of
from ..prune import run_steps
from ..reconstruct import Reconstruct
from ..source import Source, as_calibration, check_finite_outputs
from ..steps import Step
from ..training import Reconstruction
from .biases import biases_for, given
from .budget import Available, even_counts, fitted_counts
from .checks import (
    check_cuttable,
    check_excluded,
    check_found,
    check_resumable,
    check_zeros,
    keeps_blocks,
    say_incomparable,
)
from .configuration import DSAStructuredConfig
from .layout import LAYOUTS, Layout, unsaid
from .learners.budget import Projection
from .learners.gates import Gates
from .learners.learned import check_learnable, check_prompt, learned, prompt_of
from .remove import RemoveStructures
from .structure import ENTIRE, WHOLE, Place, Structures
from .structures import find_structures
from .tied import tied_gone
from .wholes.blocks import find_blocks
from .wholes.entire import entire_gone, find_entire
from .wholes.remove import remove_wholes
from .widths.dense import Dense, allocation_of, dense_model
from .widths.latency import keep
from .widths.shares import given_allocation, shares


logger = logging.getLogger(__name__)

SHORT = 16  # tokens of the sample by which structures are found: a run for every row of queries and keys


@dataclass(frozen=True)
class StructuredReport:
    """What was cut out of a model.

    Attributes:
        config (`DSAStructuredConfig`): what was asked for.
        kept (`Mapping[str, int]`): unit -> how many structures stay.
        gone (`Mapping[str, tuple[int, ...]]`): unit -> the numbers of those that went, as the dense model has them.
        costs (`Mapping[str, int]`): unit -> parameters of one.
        prunable (`int`): parameters of all blocks' matrices, before.
        parameters (`int`): all parameters of the model, before.
        removed (`int`): parameters that went, biases among them.
        left (`Mapping[str, str]`): matrices that no structure owns a part of -> why.
        calibration (`Mapping[str, Any]`, *optional*): what it was calibrated on.
        reconstruction (`Mapping[str, Reconstruction]`): block -> what training it did.
        seconds (`float`): that it took.
        allocation (`Allocation`, *optional*): the share of the structures of every unit that went, which another prune
            takes; its sizes are numbers of structures.
        shares (`Mapping[str, float]`): by name, the share of every row of `COSTS` that went.
        places (`Mapping[str, Place]`): unit -> where its structures can be counted.
        earlier (`tuple[StructuredReport, ...]`): what was cut out before, first to last.
        padding (`int`): those of `removed` that stay as zeros, so that blocks are alike: with `layout="padded"`.
        tolerance (`Mapping[str, float]`): where the share was found for a `max_loss`, that, the perplexities on
            held-out windows "dense" and as "found" in a trial, and how many "trials" there were; else empty.
        distillation (`Mapping[str, float]`): what training the whole model did, as in [`PruningReport`].
    """

    config: DSAStructuredConfig
    kept: Mapping[str, int]
    gone: Mapping[str, tuple[int, ...]]
    costs: Mapping[str, int]
    prunable: int
    parameters: int
    removed: int
    left: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    reconstruction: Mapping[str, Reconstruction] = field(default_factory=dict)
    seconds: float = 0.0
    allocation: Allocation | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    earlier: tuple[StructuredReport, ...] = ()
    padding: int = 0
    tolerance: Mapping[str, float] = field(default_factory=dict)
    distillation: Mapping[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of the parameters of the blocks' matrices that went."""
        return self.removed / self.prunable

    @property
    def _asked(self) -> str:
        if not self.tolerance:
            return f"asked {self.config.sparsity:g}"
        dense, found = self.tolerance["dense"], self.tolerance["found"]
        return (
            f"{self.config.sparsity:.4f} found for a perplexity at most {self.tolerance['max_loss']:.1%} higher: "
            f"{found / dense - 1:+.1%} on held-out windows, dense {dense:.2f}"
        )

    def __str__(self) -> str:
        kinds: dict[str, list[tuple[int, int]]] = {}
        for unit, stay in self.kept.items():
            # "layers.3:ffn", or "layers.3:head.1" of the second of a kind in a block
            kind = unit.partition(":")[2].partition(".")[0]
            kinds.setdefault(kind, []).append((stay, stay + len(self.gone[unit])))
        left = [f"{kind}: {stays_in(numbers)}" for kind, numbers in kinds.items()]
        left += [f"{self.padding:,} of them are zeros that stay"] if self.padding else []
        if self.left:
            name, reason = next(iter(self.left.items()))
            left.append(f"{len(self.left)} weights stay whole, such as {name} ({reason})")
        return (
            f"{self.removed:,} of {self.parameters:,} parameters went, {self.sparsity:.4f} of the blocks' matrices "
            f"({self._asked}); {', '.join(left)}"
        )


def stays_in(blocks: Sequence[tuple[int, int]]) -> str:
    """Such as "34 of 48 stay", or "30 to 36 of 48 stay", of how many stay in each block of how many."""
    others = [(stay, of) for stay, of in blocks if stay]
    if len(others) < len(blocks):
        none = f"none in {len(blocks) - len(others)} of {len(blocks)} blocks"
        return f"{none}, {stays_in(others)} in the others" if others else none
    stays, were = (
        f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
        for numbers in zip(*blocks)
    )
    return f"{stays} of {were} stay"


def prune_structures(
    model: nn.Module,
    calibration: Source | None,
    config: DSAStructuredConfig,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    tokenizer: Any = None,
) -> StructuredReport:
    """Make a model smaller, in place.

    Args:
        model (`nn.Module`): of any family, in memory.
        calibration (`Tensor` or `Mapping[str, Tensor]`): tokens, (samples, length), or the model's inputs by name. By
            them structures are found as well, so that there is none without.
        config (`DSAStructuredConfig`): what goes.
        checkpoints (`str`, *optional*): folder for the blocks that are finished, or a learner's state, and for the
            times of `cost="latency"`.
        resume (`bool`, defaults to `False`): go on from those in it, with the model as it was at the beginning; the
            end is that of an uninterrupted run.
        tokenizer (`Any`, *optional*): reads the `learn_prompt` of a learner.

    Raises:
        ValueError: there is nothing that can be cut out, or less than asked for, or nothing is kept of what is asked
            for; before anything is changed.
    """
    start = time.perf_counter()
    check_resumable(config, checkpoints, resume)
    prompt = prompt_of(config.learn_prompt, tokenizer)
    if config.max_loss is not None:
        from .tolerance import settled  # which prunes, to try

        calibration = as_calibration(calibration, model)
        config, tolerance = settled(model, calibration, config)
        return replace(prune_structures(model, calibration, config, tokenizer=tokenizer), tolerance=tolerance)
    times = checkpoints if resume else None
    dense = dense_of(model, calibration, config, times)
    check_prompt(prompt, dense)
    if not dense.asked:
        logger.warning("sparsity=%g takes nothing: the model stays as it is.", config.sparsity)
    own_settings_of(model)
    if config.update != "bias" or not (biases := biases_for(model, dense.units)).switches:
        return _pruned(dense, start, checkpoints, resume, prompt)
    with given(model, biases):
        return _pruned(dense_of(model, calibration, config, times), start, checkpoints, resume, prompt)


def _pruned(
    dense: Dense, start: float, checkpoints: str | Path | None, resume: bool, prompt: Tensor
) -> StructuredReport:
    """Make a model smaller, in place, whose structures are known."""
    model, config = dense.model, dense.config
    units, prunable = dense.units, dense.costs["parameters"].total
    parameters, chosen = count_parameters(model), None
    finished = finished_of(dense, checkpoints, resume) if keeps_blocks(config) else None
    if checkpoints is not None and "latency" in dense.costs:
        keep(checkpoints, dense.costs["latency"], units)
    known = finished.allocation.counts() if finished and finished.allocation else None
    counts, layout = choose_counts(dense) if known is None else (known, LAYOUTS[config.layout](model, units, known))
    stay = [kind for kind, of_kind in dense.kinds.items() if not any(counts[unit] for unit in of_kind)]
    if config.layout == "uniform" and stay and any(counts.values()):
        logger.warning(
            "Of %s nothing goes: as many from all blocks are more than the share, or no setting says how many are "
            "left; with layout='per_layer' blocks may differ.",
            " and ".join(stay),
        )
    name = str(getattr(config.allocation, "name", config.allocation))
    if finished:
        finished.begin(allocation_of(units, counts, name))
    places = {unit: each.place(model) for unit, each in units.items()}
    if config.learner is not None:
        # With widths that are given, which structures go is learned, and not how many from where.
        widths = None if config.layout != "uniform" and config.allocation == "uniform" else counts
        projection = Projection(dense.sizes, dense.asked, widths)
        name = config.learner if widths is None and config.layout != "uniform" else name
        choice = learned(dense, projection, checkpoints, resume, prompt)
        chosen, counts = choice.gone, {unit: len(gone) for unit, gone in choice.gone.items()}
        layout = LAYOUTS[config.layout](model, units, counts)
        if config.folds:
            Gates(model, units).fold(choice.scales)
    went, zeros, training = _removed(dense, layout, counts, chosen, finished)
    layout.settle(model)
    padding = sum(dense.costs["parameters"].each[unit] * number for unit, number in zeros.items())
    for unit, number in zeros.items():  # which lie among those that stay
        places[unit] = replace(places[unit], others=places[unit].others + number * places[unit].size)
    return StructuredReport(
        config=config,
        kept={unit: len(each) - len(went.get(unit, ())) for unit, each in units.items()},
        gone={unit: tuple(went.get(unit, ())) for unit in units},
        costs={unit: dense.costs["parameters"].each[unit] for unit in units},
        prunable=prunable,
        parameters=parameters,
        removed=parameters - count_parameters(model) + padding,
        left=dense.left,
        calibration=dense.calibration.facts(),
        **training,
        seconds=time.perf_counter() - start,
        allocation=allocation_of(units, counts, name),
        shares={
            name: sum(cost.each[unit] * counts[unit] for unit in units) / max(cost.total, 1)
            for name, cost in dense.costs.items()
        },
        places=places,
        padding=padding,
    )


def dense_of(
    model: nn.Module, calibration: Source | None, config: DSAStructuredConfig, times: str | Path | None = None
) -> Dense:
    """A model with the structures that are found in it, and what they cost.

    Args:
        times (`str`, *optional*): folder with what an earlier start of the run timed (`latency.json`), if it did.

    Raises:
        ValueError: there is nothing that can be cut out, or no calibration data to find it by.
    """
    check_cuttable(model, config)
    calibration = as_calibration(calibration, model)
    if not isinstance(calibration, Calibration):
        raise ValueError("What can be cut out of a model is found by running it; give calibration data.")
    if config.learner is not None:
        check_learnable(model, calibration, config.learner)
    architecture = find_architecture(model, exclude=config.exclude)
    check_finite_outputs(model, architecture, calibration)
    entire = set(config.structures) <= set(ENTIRE)
    find = find_blocks if config.structures == ("block",) else find_entire if entire else find_structures
    found = find(model, architecture, _short(calibration.batches(1)[0]))
    dense = dense_model(model, architecture, calibration, config, found, times)
    check_found(model, found.structures, dense.units, dense.left, config)
    check_zeros(model, dense.units, config)
    return dense


def choose_counts(dense: Dense) -> tuple[dict[str, int], Layout]:
    """How many go of every unit, and the layout that says what is left."""
    config, sizes, cost = dense.config, dense.sizes, dense.costs[dense.config.cost]
    if config.layout == "uniform":
        try:
            counts, layout = _said_counts(dense.model, dense.units, sizes, dense.asked, cost.what)
        except ValueError:
            check_excluded(dense.architecture, dense.units, config)  # which may be why
            raise
    else:
        say_incomparable(config)
        proposed = shares(dense) if dense.asked else None
        counts = fitted_counts(sizes, dense.asked, proposed, cost.what)
        layout = LAYOUTS[config.layout](dense.model, dense.units, counts)
    if dense.asked and not any(counts.values()):
        each = {unit: size.cost * size.round_to for unit, size in sizes.items() if size.most}
        if config.layout == "uniform":
            kinds = dense.kinds.values()
            each = {units[0]: sum(each[u] for u in units) for units in kinds if all(u in each for u in units)}
        raise ValueError(
            f"A sparsity of {config.sparsity:g} takes nothing: the least that can go is "
            f"{min(each.values()) / cost.total:.4f} of the blocks; ask for more, or for smaller structures."
        )
    return counts, layout


def finished_of(dense: Dense, checkpoints: str | Path | None, resume: bool) -> FinishedBlocks | None:
    """What an earlier run of a cut finished, and where this one's blocks go; `None` where they are not kept."""
    if checkpoints is None:
        return None
    names = [block.name for block in dense.architecture.blocks]
    given = given_allocation(dense.config.allocation)
    settings = settings_of(dense.model, dense.calibration, dense.config, given)
    return FinishedBlocks.open(checkpoints, resume, settings, names)


def _removed(
    dense: Dense,
    layout: Layout,
    counts: Mapping[str, int],
    chosen: Mapping[str, Sequence[int]] | None,
    finished: FinishedBlocks | None,
) -> tuple[dict[str, list[int]], dict[str, int], dict[str, Mapping]]:
    """Take `counts` structures of every unit out, in place: the numbers of those that went, and what training did.

    Between the two, how many of a unit stay as zeros; training by the fields of a report.

    Wholes go first, and the blocks are walked without them. `chosen` tells which go, where that is settled already.
    Blocks that are `finished` are put back.
    """
    model, config, units, calibration = dense.model, dense.config, dense.units, dense.calibration
    chosen = tied_gone(dense, counts) | entire_gone(units, counts) if chosen is None else chosen
    unsettled = {unit: each for unit, each in units.items() if unit not in chosen}
    distillation = distillation_of(model, dense.architecture, calibration, config)
    products = dense.products if unsettled else {}
    wholes = remove_wholes(model, units, counts, calibration, config, products)
    parts = {unit: each for unit, each in units.items() if each.kind not in WHOLE}
    remove = RemoveStructures(config, parts, counts, chosen, products)
    reconstruct = Reconstruct(config.reconstruct, config.data.seed)
    steps: list[Step] = [remove, *([reconstruct] if config.reconstruct.steps else [])]
    inside = any(each.kind not in WHOLE for each in units.values())
    # Patterns may name what is gone by now, and of wholes alone nothing is calibrated.
    found = wholes and (inside or distillation)
    architecture = find_architecture(model, exclude=config.exclude) if found else dense.architecture
    if inside:
        run_steps(model, architecture, calibration, config, steps, lambda walked: None, finished)
    distilled = distillation(architecture) if distillation else {}
    zeros = {unit: layout.take(model, units[unit], gone) for unit, gone in remove.gone.items()}
    return wholes | remove.notes, zeros, {"reconstruction": reconstruct.found, "distillation": distilled}


def _said_counts(
    model: nn.Module, units: Mapping[str, Structures], sizes: Mapping[str, Available], asked: int, what: str
) -> tuple[dict[str, int], Layout]:
    """How many go of every unit, alike in all blocks, and the layout that says what is left.

    Where it cannot say so many heads, fewer go, and more of the rest.
    """
    kinds, refused = {unit: (each.kind, len(each)) for unit, each in units.items()}, None
    silent = unsaid(model, units)
    if silent and len(silent) < len(units):
        logger.warning("No setting says how many channels %s have (%d in all); they stay.", min(silent), len(silent))
        sizes = {unit: replace(size, limit=0) if unit in silent else size for unit, size in sizes.items()}
    while True:
        counts: dict[str, int] = {}
        try:
            counts = even_counts(kinds, sizes, asked, what)
            return counts, LAYOUTS["uniform"](model, units, counts)
        except ValueError as error:
            refused = refused or error
        heads = {unit: counts[unit] for unit, each in units.items() if each.kind != "ffn" and counts.get(unit)}
        if not heads or len(heads) == len(units):
            raise refused
        sizes = {unit: replace(size, limit=heads[unit] - 1) if unit in heads else size for unit, size in sizes.items()}


def _short(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first tokens of a batch of one sample, (1, length, ...), where it is tokens alone."""
    lengths = {value.shape[1:2] for value in batch.values()}
    alone = len(lengths) == 1 and all(value.dim() == 2 and not value.is_floating_point() for value in batch.values())
    return {name: value[:, :SHORT] if alone else value for name, value in batch.items()}
