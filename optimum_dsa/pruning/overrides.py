"""Sparsities that are given for some matrices by name, such as "mlp=0.6": the others make up for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..common.registry import near
from ..model.architecture import Architecture, Block, matches
from .allocation import Allocation, split_count


if TYPE_CHECKING:
    from .configuration import DSAConfig


def check_overrides(config: DSAConfig) -> None:
    """Raise `ValueError` where the overrides of `config` cannot be read, or nothing could follow them."""
    if not config.overrides:
        return
    shares, pattern = parsed(config.overrides), config.resolved.pattern
    if config.allocator is None:
        raise ValueError(
            "overrides are for an allocation that is computed; one that is given has every unit's sparsity: change it "
            "there, or name an allocation, such as 'owl'."
        )
    if pattern.sparsity is not None:
        raise ValueError(
            f"Pattern {pattern} removes {pattern.sparsity:.4g} of every matrix, whatever overrides say; use "
            f"pattern='mixed:{pattern.width}', or exclude what shall stay dense."
        )
    # The defaults are bounds of what is computed; who gives bounds of his own means all units.
    low = config.min_sparsity if config.min_sparsity != type(config).min_sparsity else 0.0
    high = config.max_sparsity if config.max_sparsity != type(config).max_sparsity else 1.0
    for name, share in shares.items():
        if not low <= share <= high:
            raise ValueError(
                f"overrides: {name}={share:g} is not in [{low:g}, {high:g}], as min_sparsity and max_sparsity ask of "
                "every unit; change one of both."
            )
        if pattern.kind == "mixed" and abs(share * pattern.width - round(share * pattern.width)) > 1e-6:
            raise ValueError(
                f"overrides: {name}={share:g} is no whole number of {pattern.width} weights, as pattern {pattern} "
                f"removes them; use {round(share * pattern.width) / pattern.width:g}, or a larger M."
            )


def parsed(overrides: Sequence[str], setting: str = "overrides", example: str = "mlp=0.6") -> dict[str, float]:
    """Name or pattern -> share, in the order in which they are given in `setting`.

    Raises:
        ValueError: one is not of the form of the `example` with a number in [0, 1].
    """
    found: dict[str, float] = {}
    for text in overrides:
        name, _, number = text.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not name or not 0 <= share <= 1:
            raise ValueError(
                f"{setting}: cannot read {text!r}; expected a name and a share in [0, 1], as in {example}."
            )
        if name in found:
            raise ValueError(f"{setting}: {name!r} is given twice, {found[name]:g} and {share:g}; leave out one.")
        found[name] = share
    return found


def given_shares(architecture: Architecture, overrides: Sequence[str]) -> dict[str, float]:
    """Matrix -> the sparsity that is given for it, of those that a name or pattern names; of several the last.

    Raises:
        ValueError: one names no matrix that is pruned.
    """
    found: dict[str, float] = {}
    for pattern, share in parsed(overrides).items():
        found |= dict.fromkeys(named_in(architecture, pattern, "overrides"), share)
    return found


def named_in(architecture: Architecture, pattern: str, setting: str) -> list[str]:
    """The matrices that are pruned that a name or pattern of a setting names; `ValueError` where it names none."""
    named = [weight.name for weight in architecture.weights if matches(weight.name, pattern)]
    if not named:
        parts = {part for weight in architecture.weights for part in weight.name.split(".")}
        raise ValueError(f"{setting}: no matrix that is pruned is named {pattern!r}.{near(pattern, parts)}")
    return named


def without(architecture: Architecture, names: Mapping[str, float]) -> Architecture:
    """`architecture` without the matrices of these names: what is left to find a sparsity for."""

    def rest(block: Block) -> Block:
        return replace(block, weights=tuple(weight for weight in block.weights if weight.name not in names))

    stacks = tuple(replace(stack, blocks=tuple(map(rest, stack.blocks))) for stack in architecture.stacks)
    head = rest(architecture.head) if architecture.head else None
    return replace(architecture, stacks=stacks, head=head if head and head.weights else None)


def sparsity_of_rest(
    config: DSAConfig, architecture: Architecture, shares: Mapping[str, float], standing: Mapping[str, int]
) -> float | None:
    """The sparsity at which the matrices that have none in `shares` make the mean the config's; `None` without such.

    Raises:
        ValueError: there is none within the config's bounds, a matrix has more zeros than it is given, or the others
            have more than is left for them.
    """
    from .zeros import FEWEST_ZEROS  # which needs the configuration, whose check is here

    sizes = {weight.name: weight.size for weight in architecture.weights}
    goal, given = round(config.sparsity * sum(sizes.values())), 0
    for name, share in shares.items():
        given += round(share * sizes[name])
        if standing.get(name, 0) > round(share * sizes[name]) and not config.resolved.pattern.in_groups:
            raise ValueError(
                f"overrides: {name} is given {share:g}, and {standing[name] / sizes[name]:.4f} of it is zero already; "
                "give it as much or more."
            )
    left = sum(size for name, size in sizes.items() if name not in shares)
    needed = (goal - given) / max(left, 1)
    low, high = (config.min_sparsity, config.max_sparsity) if left else (0.0, 0.0)
    slack = 0.0 if left else 5e-4 * sum(sizes.values())
    if not low - slack <= needed <= high + slack:
        where = f"the other {left:,} weights would be pruned to {needed:.4f}" if left else "nothing else is left"
        raise ValueError(
            f"overrides give {given:,} of the {goal:,} zeros that a sparsity of {config.sparsity:g} is, and {where}, "
            f"which is not in [{low:g}, {high:g}]; change them or the sparsity."
        )
    zeros = sum(number for name, number in standing.items() if name not in shares)
    if zeros - (goal - given) > FEWEST_ZEROS * left:  # zeros keep, so that the mean would be another
        raise ValueError(
            f"overrides leave a sparsity of {needed:.4f} to the other {left:,} weights, and {zeros / left:.4f} of "
            f"these is zero already; give less to what they name, or ask for a sparsity of "
            f"{math.ceil(1e4 * (given + zeros) / sum(sizes.values())) / 1e4:g} or more."
        )
    return needed if left else None


def with_given(
    found: Allocation | None,
    architecture: Architecture,
    rest: Architecture,
    shares: Mapping[str, float],
    floors: Mapping[str, int],
) -> Allocation:
    """The allocation per matrix: what was `found` for the `rest`, and the `shares` that were given."""
    sizes = {weight.name: weight.size for weight in architecture.weights}
    counts = {name: round(share * sizes[name]) for name, share in shares.items()}
    if found is not None:
        units, total = rest.units(found.granularity), found.counts()
        for unit, weights in units.items():
            counts |= split_count(total[unit], {weight.name: weight.size for weight in weights}, floors)
    name = "overrides" if found is None else found.name
    return Allocation({each: counts[each] / size for each, size in sizes.items()}, sizes, name, "matrix")
