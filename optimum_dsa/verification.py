"""Whether a pruned model is what its `dsa_config.json` says: zeros, pattern and budget, counted in the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .allocation import split_count
from .architecture import Architecture
from .calibration import walk_blocks
from .masks import Pattern
from .pruning import architecture_for
from .report import PruningReport


@dataclass(frozen=True)
class Verification:
    """What `verify` found; `print` shows it.

    Attributes:
        problems (`tuple[str, ...]`): what is not as described, a sentence each; empty where everything holds.
        removed (`int`): zeros counted in the prunable weights.
        prunable (`int`): prunable weights.
        pattern (`str`): the pattern that was checked.
    """

    problems: tuple[str, ...]
    removed: int
    prunable: int
    pattern: str

    @property
    def holds(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        share = self.removed / max(self.prunable, 1)
        counted = (
            f"{self.removed:,} of {self.prunable:,} prunable weights are zero ({share:.4f}), pattern {self.pattern}"
        )
        if self.holds:
            return f"holds: {counted}"
        return "\n".join([*(f"wrong: {problem}" for problem in self.problems), f"counted: {counted}"])


@torch.no_grad()
def verify(model: nn.Module, report: PruningReport) -> Verification:
    """Count the zeros of `model`, block by block, and hold them against `report`.

    Checked are: that the report agrees with itself (every unit's share is a whole number of weights, their sum is the
    sparsity asked for, as near as the pattern lets it be); that the model has the units and sizes; that every unit has
    exactly the zeros that were counted when it was pruned; and that every matrix has its share of them in the pattern.
    """
    problems = list(_disagreements(report))
    try:
        architecture = architecture_for(model, report.config)
    except ValueError as error:
        return Verification((*problems, f"the model cannot be pruned as described: {error}"), 0, 0, _pattern(report))
    described = report.allocation.sizes
    granularity = max(("block", "matrix"), key=lambda name: len(architecture.units(name).keys() & described.keys()))
    units = architecture.units(granularity)
    sizes = {unit: sum(weight.size for weight in weights) for unit, weights in units.items()}
    if sizes != described:
        odd = next(unit for unit in {**sizes, **described} if sizes.get(unit) != described.get(unit))
        problems.append(
            f"the model has other units or sizes than described, such as {odd}: {sizes.get(odd, 'none')} weights, "
            f"described are {described.get(odd, 'none')}"
        )
        return Verification(tuple(problems), 0, sum(sizes.values()), _pattern(report))
    zeros, breaches = _count(model, architecture, report, granularity)
    for unit, size in sizes.items():
        expected = round(report.achieved.get(unit, 0.0) * size)
        if zeros[unit] != expected:
            difference = f"{abs(zeros[unit] - expected):,} {'fewer' if zeros[unit] < expected else 'more'}"
            problems.append(f"{unit} has {zeros[unit]:,} zeros, {difference} than the {expected:,} described")
    return Verification((*problems, *breaches), sum(zeros.values()), sum(sizes.values()), _pattern(report))


def _disagreements(report: PruningReport) -> Iterator[str]:
    """Where a report contradicts itself."""
    sizes, counts, pattern = report.allocation.sizes, report.allocation.counts(), Pattern.parse(_pattern(report))
    if report.achieved.keys() != sizes.keys():
        odd = sorted(report.achieved.keys() ^ sizes.keys())
        yield f"allocation and achieved sparsity are given for different units, such as {odd[0]}"
        return
    total = sum(sizes.values())
    asked = round(report.config.sparsity * total)
    # N:M removes whole numbers per group: rounding is over by half of the coarsest step of a unit at most
    slack = max(sizes.values(), default=0) / pattern.width / 2 if pattern.kind in ("n:m", "mixed") else 0
    if abs(sum(counts.values()) - asked) > slack:
        yield (
            f"the allocation removes {sum(counts.values()):,} of {total:,} weights, and a sparsity of "
            f"{report.config.sparsity} removes {asked:,}"
        )
    for unit, size in sizes.items():
        if abs(report.achieved[unit] * size - round(report.achieved[unit] * size)) > 1e-3:
            yield f"{unit}: a share of {report.achieved[unit]} is no whole number of its {size:,} weights"
        if round(report.achieved[unit] * size) < counts[unit] and pattern.kind not in ("n:m", "mixed"):
            yield f"{unit}: {counts[unit]:,} weights were allocated, and fewer were removed"


def _count(
    model: nn.Module, architecture: Architecture, report: PruningReport, granularity: str
) -> tuple[dict[str, int], list[str]]:
    """Zeros per unit, and the matrices that break the pattern."""
    pattern, counts = Pattern.parse(_pattern(report)), report.allocation.counts()
    zeros: dict[str, int] = {}
    breaches = []
    for walked in walk_blocks(model, architecture, None):
        if not walked.weights:
            continue
        units = {walked.name: walked.weights}
        if granularity == "matrix":
            units = {weight.name: (weight,) for weight in walked.weights}
        for unit, weights in units.items():
            shares = split_count(counts[unit], {weight.name: weight.size for weight in weights})
            zeros[unit] = 0
            for weight in weights:
                removed = walked.tensor(weight) == 0
                zeros[unit] += int(removed.sum())
                if not pattern.holds(removed, shares[weight.name]):
                    breaches.append(
                        f"{weight.name} does not have the pattern {pattern} at {shares[weight.name]:,} zeros"
                    )
    return zeros, breaches


def _pattern(report: PruningReport) -> str:
    return report.config.recipe.pattern
