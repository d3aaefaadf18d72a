"""A model made smaller: structures found, chosen, silenced while the blocks are walked, and cut out in the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...model.architecture import Architecture, find_architecture
from ...model.parameters import count_parameters
from ..calibration import Calibration
from ..prune import run_steps
from ..reconstruct import Reconstruct
from ..source import Source, as_calibration, check_finite_outputs
from ..steps import Step
from ..training import Reconstruction
from .budget import Available, even_counts, uniform_counts
from .configuration import DSAStructuredConfig
from .layout import settle, smaller_config, unsaid
from .learners.budget import Projection
from .learners.gates import Gates
from .learners.learned import check_learnable, learned
from .remove import RemoveStructures
from .scores import products_of
from .slicing import cut_out
from .structure import WHOLE, Structures
from .structures import find_structures
from .wholes.blocks import find_blocks
from .wholes.remove import remove_wholes


logger = logging.getLogger(__name__)

SHORT = 16  # tokens of the sample by which structures are found: a run for every row of a matrix


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

    @property
    def sparsity(self) -> float:
        """Share of the parameters of the blocks' matrices that went."""
        return self.removed / self.prunable

    def __str__(self) -> str:
        kinds: dict[str, list[tuple[int, int]]] = {}
        for unit, stay in self.kept.items():
            # "layers.3:ffn", or "layers.3:head.1" of the second of a kind in a block
            kind = unit.partition(":")[2].partition(".")[0]
            kinds.setdefault(kind, []).append((stay, stay + len(self.gone[unit])))
        left = [f"{kind}: {_range(*zip(*numbers))}" for kind, numbers in kinds.items()]
        return (
            f"{self.removed:,} of {self.parameters:,} parameters went, {self.sparsity:.4f} of the blocks' matrices "
            f"(asked {self.config.sparsity:g}); {', '.join(left)}"
        )


def _range(stay: Sequence[int], before: Sequence[int]) -> str:
    """Such as "34 of 48 stay", or "30 to 36 of 48", by block."""
    stays, were = (
        f"{min(numbers)}" if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
        for numbers in (stay, before)
    )
    return f"{stays} of {were} stay"


def prune_structures(
    model: nn.Module,
    calibration: Source | None,
    config: DSAStructuredConfig,
    learning: str | Path | None = None,
    resume: bool = False,
) -> StructuredReport:
    """Make a model smaller, in place.

    Args:
        model (`nn.Module`): of any family, in memory.
        calibration (`Tensor` or `Mapping[str, Tensor]`): tokens, (samples, length), or the model's inputs by name. By
            them structures are found as well, so that there is none without.
        config (`DSAStructuredConfig`): what goes.
        learning (`str`, *optional*): folder in which a learner keeps its state.
        resume (`bool`, defaults to `False`): go on from the state in it, with the model as it was at the beginning.

    Raises:
        ValueError: there is nothing that can be cut out, or less than asked for; before anything is changed.
    """
    start = time.perf_counter()
    calibration = as_calibration(calibration, model)
    if not isinstance(calibration, Calibration):
        raise ValueError("What can be cut out of a model is found by running it; give calibration data.")
    if config.learner is not None:
        check_learnable(model, calibration, config.learner)
    architecture = find_architecture(model, exclude=config.exclude)
    check_finite_outputs(model, architecture, calibration)
    find = find_blocks if config.structures == ("block",) else find_structures
    found = find(model, architecture, _short(calibration.batches(1)[0]))
    units = {unit: each for unit, each in found.structures.items() if each.kind in config.structures}
    _check(model, units, found.left, config)
    costs = {unit: each.cost(model) for unit, each in units.items()}
    prunable, parameters = sum(weight.size for weight in architecture.weights), count_parameters(model)
    if find is find_blocks:  # norms and all, so that half of it are half of the blocks
        prunable = sum(each.size(model) for each in units.values())
    rounds = {"ffn": config.round_to}
    sizes = {
        unit: Available(len(each), costs[unit], rounds.get(each.kind, 1), len(each) - each.least)
        for unit, each in units.items()
    }
    whole = sum(costs[unit] * len(each) for unit, each in units.items())
    asked = int(config.sparsity * (whole if find is find_blocks else prunable))
    if config.layout == "uniform":
        counts, smaller = _said_counts(model, units, sizes, asked)
    else:
        counts, smaller = uniform_counts(sizes, asked), {}
    if asked and not any(counts.values()):
        least = min(sum(costs[u] for u in units if units[u].kind == kind) for kind in config.structures)
        least = least if config.layout == "uniform" else min(costs.values())
        raise ValueError(
            f"A sparsity of {config.sparsity:g} takes nothing: the least that can go is {least / prunable:.4f} of the "
            "blocks; ask for more, or for smaller structures."
        )
    chosen = None
    if config.learner is not None:
        projection = Projection(sizes, asked, counts if config.layout == "uniform" else None)
        choice = learned(model, architecture, calibration, config, units, projection, learning, resume)
        chosen, counts = choice.gone, {unit: len(gone) for unit, gone in choice.gone.items()}
        if config.folds:
            Gates(model, units).fold(choice.scales)
    went, reconstruction = _removed(model, architecture, calibration, config, units, counts, chosen)
    if find is not find_blocks:  # which of them went, a configuration knows by now
        settle(model, smaller)
    return StructuredReport(
        config=config,
        kept={unit: len(each) - len(went.get(unit, ())) for unit, each in units.items()},
        gone={unit: tuple(went.get(unit, ())) for unit in units},
        costs=costs,
        prunable=prunable,
        parameters=parameters,
        removed=parameters - count_parameters(model),
        left=found.left,
        calibration=calibration.facts(),
        reconstruction=reconstruction,
        seconds=time.perf_counter() - start,
    )


def _removed(
    model: nn.Module,
    architecture: Architecture,
    calibration: Calibration,
    config: DSAStructuredConfig,
    units: Mapping[str, Structures],
    counts: Mapping[str, int],
    chosen: Mapping[str, Sequence[int]] | None,
) -> tuple[dict[str, list[int]], Mapping[str, Reconstruction]]:
    """Cut `counts` structures of every unit out, in place: the numbers of those that went, and what training did.

    Wholes go first, and the blocks are walked without them. `chosen` tells which go, where that is settled already.
    """
    products = products_of(model, units, calibration, config) if chosen is None else {}
    wholes = remove_wholes(model, units, counts, calibration, config, products)
    parts = {unit: each for unit, each in units.items() if each.kind not in WHOLE}
    remove = RemoveStructures(config, parts, counts, chosen, products)
    reconstruct = Reconstruct(config.reconstruct, config.data.seed)
    steps: list[Step] = [remove, *([reconstruct] if config.reconstruct.steps else [])]
    if parts:
        architecture = find_architecture(model, exclude=config.exclude) if wholes else architecture
        run_steps(model, architecture, calibration, config, steps, lambda walked: None)
    for unit, gone in remove.gone.items():
        cut_out(model, units[unit], gone)
    return wholes | remove.notes, reconstruct.found


def _said_counts(
    model: nn.Module, units: Mapping[str, Structures], sizes: Mapping[str, Available], asked: int
) -> tuple[dict[str, int], dict[str, int]]:
    """How many go of every unit, alike in all blocks, and what the model's configuration says then.

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
            counts = even_counts(kinds, sizes, asked)
            return counts, smaller_config(model, units, counts)
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


def _check(
    model: nn.Module, units: Mapping[str, Structures], left: Mapping[str, str], config: DSAStructuredConfig
) -> None:
    """Raise `ValueError` where there is nothing to be cut out, or no bias to add to."""
    if not units:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise ValueError(
            f"{type(model).__name__} has no {' or '.join(config.structures)} that could be cut out"
            f"{f' ({why})' if why else ''}."
        )
    if missing := [kind for kind in config.structures if all(each.kind != kind for each in units.values())]:
        logger.warning("%s has no %s that could be cut out.", type(model).__name__, " or ".join(missing))
    if config.update == "bias":
        readers = {cut.tensor.rpartition(".")[0] for each in units.values() for cut in each.reads}
        without = sorted(name for name in readers if getattr(model.get_submodule(name), "bias", None) is None)
        if without:
            raise ValueError(
                f"update='bias' adds to the bias of what reads a structure, and {without[0]} has none (nor have "
                f"{len(without) - 1} others); use update='refit'."
            )
