"""Whether a pruned model is what its `dsa_config.json` says: zeros, pattern and budget, counted in the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.escaping import one_line
from ..model.adapters import inner_model, plain_name
from ..model.architecture import GRANULARITIES, Architecture, Weight
from ..model.parameters import count_parameters
from ..packed.grid import grid_of
from ..packed.pack_model import seen_dense
from ..pruning.allocate import architecture_for
from ..pruning.allocation import split_count
from ..pruning.other_head import is_other_head, report_for
from ..pruning.report import PruningReport
from ..pruning.structured.described import stay_of, widths
from ..pruning.structured.importance import chosen_by
from ..pruning.structured.structure import Place
from ..pruning.unstructured.floors import could_stand
from ..pruning.zeros import MEASURED, count_zeros
from .description import contradictions, seal_of


# What a checksum tells of the file; of one that is as it was written, nothing needs to be said.
SEALS = {
    "broken": "dsa_config.json was changed after it was written: its checksum is another",
    "missing": "dsa_config.json has no checksum, and every file of its version is written with one: it was removed",
}
NO_SEAL = "that dsa_config.json is as it was written: version 1 has no checksum, so nothing vouches for the file"
TRAINING = "training after pruning, its losses and perplexities"


@dataclass(frozen=True)
class Verification:
    """What `verify` found; `print` shows it.

    Attributes:
        problems (`tuple[str, ...]`): what is not as described, a sentence each; empty where everything holds.
        removed (`int`): zeros counted in the prunable weights.
        prunable (`int`): prunable weights.
        pattern (`str`): the pattern that was checked.
        unproven (`tuple[str, ...]`): what is described and cannot be told from weights, be it true or not.
        parameters (`int`): all parameters, counted.
        zeros (`Mapping[str, int]`): zeros counted in every unit; empty where units could not be counted.
        sizes (`Mapping[str, int]`): weights counted in every unit.
        widths (`Mapping[str, tuple[int, int]]`): structures counted in every unit that some were cut out of, and how
            many it had; empty where none were.
        rounded (`int`): zeros beyond those described, which kept weights became where a file's numbers are coarse.
    """

    problems: tuple[str, ...]
    removed: int
    prunable: int
    pattern: str
    unproven: tuple[str, ...] = ()
    parameters: int = 0
    zeros: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rounded: int = 0

    @property
    def holds(self) -> bool:
        """Whether nothing that was checked is wrong. What is in `unproven` may be wrong all the same."""
        return not self.problems

    def __str__(self) -> str:
        share = self.removed / max(self.prunable, 1)
        counted = (
            f"{self.removed:,} of {self.prunable:,} prunable weights are zero ({share:.4f}), pattern {self.pattern}"
        )
        if self.rounded:
            counted += f"; {self.rounded:,} of them were kept, and are rounded to zero in this file"
        if self.widths:
            counted = f"{stay_of(self.widths)}; {counted}"
        lines = [f"holds: {counted}"]
        if not self.holds:
            lines = [*(f"wrong: {problem}" for problem in self.problems), f"counted: {counted}"]
        return "\n".join(map(one_line, [*lines, *(f"not proven: {part}" for part in self.unproven)]))


@torch.no_grad()
def verify(
    model: nn.Module,
    report: PruningReport,
    description: Mapping[str, Any] | None = None,
    trained: bool = False,
    rounded: bool = False,
) -> Verification:
    """Count the zeros of `model`, block by block, and hold them against `report`.

    Of a smaller model also the structures of every unit, in the widths of its matrices.

    Checked are: that the report agrees with itself (every unit's share is a whole number of weights, their sum is the
    sparsity asked for, as near as the pattern lets it be); that the model has the units, sizes and parameters; that
    every unit has exactly the zeros that were counted when it was pruned; and that every matrix has its share of them
    in the pattern; and that what is kept of it lies on a grid of whole numbers, where the config asked for that and
    nothing `trained` it since. Of a `description`, the content of `dsa_config.json` that the report is from, also its
    totals and its checksum. Of a model whose weights were `rounded` since, units may have more zeros than described,
    which are counted apart.
    """
    checked = _Checked(list(_disagreements(report)), _recipes(report))
    checked.rounds = rounded
    checked.trained = trained or rounded or "recovery" in (description or {})
    if description is not None:
        checked.problems += [problem for problem in contradictions(description) if problem not in checked.problems]
        seal = seal_of(description)
        checked.problems += [SEALS[seal]] if seal in SEALS else []
        checked.unproven += [NO_SEAL] if seal == "none" else []
        checked.unproven += [TRAINING] if "recovery" in description else []
    with seen_dense(model):
        return _counted(inner_model(model), report_for(model, report), checked)


def _counted(model: nn.Module, report: PruningReport, checked: _Checked) -> Verification:
    """What is `checked` so far, and the weights of `model` held against `report`."""
    pattern, parameters = _pattern(report), count_parameters(model)
    if report.structured is not None:
        checked.count_structures(model, widths(report.structured))
    try:
        architecture = architecture_for(model, report.config)
    # A finding, not an error: a model that cannot be pruned as described is not the one described.
    except ValueError as error:
        checked.problems.append(f"the model cannot be pruned as described: {error}")
        return checked.result(0, 0, pattern, parameters)
    described = report.allocation.sizes
    granularity = report.allocation.granularity or _granularity_of(described, architecture) or "block"
    units = _units(architecture, granularity)
    sizes = {unit: sum(weight.size for weight in weights) for unit, weights in units.items()}
    if sizes != described:
        odd = next(unit for unit in {**sizes, **described} if sizes.get(unit) != described.get(unit))
        checked.problems.append(
            f"the model has other units or sizes than described, such as {odd}: {sizes.get(odd, 'none')} weights, "
            f"described are {described.get(odd, 'none')}"
        )
        return checked.result(0, sum(sizes.values()), pattern, parameters)
    if parameters != report.parameters and is_other_head(model):
        checked.unproven.append(
            f"the number of all parameters: this is a {type(model).__name__}, and another head was on it"
        )
    elif parameters != report.parameters:
        checked.problems.append(f"the model has {parameters:,} parameters, described are {report.parameters:,}")
    zeros, breaches = _count(model, architecture, report, granularity, not checked.trained)
    for unit, size in sizes.items():
        # Exactly: one zero more or less is another model.
        expected = round(report.achieved.get(unit, 0.0) * size)
        if checked.rounds and zeros[unit] > expected:
            checked.rounded += zeros[unit] - expected
        elif zeros[unit] != expected:
            difference = f"{abs(zeros[unit] - expected):,} {'fewer' if zeros[unit] < expected else 'more'}"
            checked.problems.append(f"{unit} has {zeros[unit]:,} zeros, {difference} than the {expected:,} described")
    checked.problems += breaches
    return checked.result(sum(zeros.values()), sum(sizes.values()), pattern, parameters, zeros, sizes)


@dataclass
class _Checked:
    problems: list[str]
    unproven: list[str]
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    trained: bool = False
    rounds: bool = False  # whether kept weights may have become zero by that
    rounded: int = 0

    def result(self, removed: int, prunable: int, pattern: str, parameters: int, *counted) -> Verification:
        found = tuple(self.problems), removed, prunable, pattern, tuple(self.unproven), parameters
        more = {"widths": self.widths} if self.widths else {}
        return Verification(*found, *counted, **more, rounded=self.rounded)

    def count_structures(self, model: nn.Module, described: Mapping[str, tuple[int, int, Place | None]]) -> None:
        """Hold the widths of `model` against how many structures are `described` to stay of how many."""
        for unit, (stay, were, place) in described.items():
            try:
                found = None if place is None else place.count(model)
            except (AttributeError, IndexError):  # no such matrix
                found = None
            if found is None:
                self.problems.append(f"{unit}: its structures cannot be counted, as the model has no such matrix")
                continue
            self.widths[unit] = int(found), were
            if found != stay:
                shown = f"{found:g}" if found == int(found) else f"no whole number ({found:.2f})"
                self.problems.append(f"{unit} has {shown} of its {were:,} structures, described are {stay:,}")


def _recipes(report: PruningReport) -> list[str]:
    """What made the model, as far as weights cannot tell it."""
    cut = report.structured
    if cut is None:
        return [_recipe(report)]
    data = (cut.calibration or {}).get("source") or "none"
    told = (
        f"which structures went, by {chosen_by(cut.config.to_dict())}, update "
        f"{cut.config.update}, calibration data ({data}), base model and versions: weights do not tell them"
    )
    # Zeros that fill blocks up to the widest one are told by the layout.
    no_zeros = report.allocation.name == MEASURED and (not report.removed or cut.config.layout == "padded")
    return [told] if no_zeros else [told, _recipe(report)]


def _recipe(report: PruningReport) -> str:
    """What pruned the model, as far as zeros cannot tell it."""
    config, name = report.config, report.allocation.name
    if report.chosen_by:
        return (
            f"that {report.chosen_by} chose the zeros while the model was trained (recover), the name {name} of the "
            "allocation, base model and versions: weights do not tell them"
        )
    if name == MEASURED:
        return "how the zeros came about: nothing that came with the model says it"
    data = (report.calibration or {}).get("source") or "none"
    return (
        f"method {config.method} (metric {config.recipe.metric}, update {config.recipe.update}), the name {name} of "
        f"the allocation, calibration data ({data}), base model and versions: weights do not tell them"
    )


def _disagreements(report: PruningReport) -> Iterator[str]:
    """Where a report contradicts itself."""
    sizes, counts, pattern = report.allocation.sizes, report.allocation.counts(), report.config.resolved.pattern
    if report.achieved.keys() != sizes.keys():
        odd = sorted(report.achieved.keys() ^ sizes.keys())
        yield f"allocation and achieved sparsity are given for different units, such as {odd[0]}"
        return
    total = sum(sizes.values())
    # A share of zeros that is typed in four digits may be a little less than what was zero already.
    before = 0 if pattern.in_groups else sum(report.zeros_before.values())
    asked = max(round(report.config.sparsity * total), before)
    # N:M removes whole numbers per group: rounding is over by half of the coarsest step of a unit at most
    slack = max(sizes.values(), default=0) / pattern.width / 2 if pattern.in_groups else 0
    if abs(sum(counts.values()) - asked) > slack:
        yield (
            f"the allocation removes {sum(counts.values()):,} of {total:,} weights, and a sparsity of "
            f"{report.config.sparsity} removes {asked:,}"
        )
    for unit, size in sizes.items():
        if abs(report.achieved[unit] * size - round(report.achieved[unit] * size)) > 1e-3:
            yield f"{unit}: a share of {report.achieved[unit]} is no whole number of its {size:,} weights"
        if round(report.achieved[unit] * size) < counts[unit] and not pattern.in_groups:
            yield f"{unit}: {counts[unit]:,} weights were allocated, and fewer were removed"


def _count(
    model: nn.Module, architecture: Architecture, report: PruningReport, granularity: str, on_grid: bool
) -> tuple[dict[str, int], list[str]]:
    """Zeros per unit, and the matrices that break the pattern or have lost zeros that they had before.

    With `on_grid`, also those whose values are not the whole numbers times scales that the config asked for.
    """
    pattern, counts = report.config.resolved.pattern, report.allocation.counts()
    units = _units(architecture, granularity)
    before = {weight.name: report.zeros_before.get(plain_name(weight.name), 0) for weight in architecture.weights}
    floors = {} if pattern.in_groups else before
    shares: dict[str, int] = {}
    for unit, weights in units.items():
        shares |= split_count(counts[unit], {weight.name: weight.size for weight in weights}, floors)
    breaches, bits = [], report.config.values.bits if on_grid else None

    def look(weight: Weight, tensor: Tensor) -> None:
        """Note a weight, (out_features, in_features), whose zeros break the pattern, or that lies on no grid."""
        name, older, removed = plain_name(weight.name), before[weight.name], tensor == 0
        if bits and grid_of(tensor, bits) is None:
            breaches.append(f"{name} does not lie on a grid of {bits} bits")
        if int(removed.sum()) < older:
            breaches.append(f"{name} has {int(removed.sum()):,} zeros, and had {older:,} before it was pruned")
        # Of zeros that were only counted nobody has said by which pattern they went.
        if report.allocation.name != MEASURED and not could_stand(pattern, removed, shares[weight.name], older):
            breaches.append(f"{name} does not have the pattern {pattern} at {shares[weight.name]:,} zeros")

    zeros = count_zeros(model, architecture, look)
    return {unit: sum(zeros[weight.name] for weight in weights) for unit, weights in units.items()}, breaches


def _units(architecture: Architecture, granularity: str) -> dict[str, tuple[Weight, ...]]:
    return {plain_name(unit): weights for unit, weights in architecture.units(granularity).items()}


def _granularity_of(described: Collection[str], architecture: Architecture) -> str | None:
    return next((known for known in GRANULARITIES if _units(architecture, known).keys() == set(described)), None)


def _pattern(report: PruningReport) -> str:
    return report.config.recipe.pattern
