"""What share of its structures each unit is to lose: a row each, beside the allocators of unstructured pruning.

A row takes the [`Dense`] model, and returns unit -> share; the budget comes after, always (`fitted_counts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ....common.registry import Registry, UnknownNameError, near
from ...allocation import Allocation, Allocator, measured_in_one_walk
from ...configuration import AUTO, DSAConfig
from ..wholes.entire import first_to_go
from .exact import Budget, least_error


if TYPE_CHECKING:
    from .dense import Dense


# (dense model) -> unit -> share of its structures that goes
SHARES = Registry("allocation of structures")

SPREAD = 0.08  # half the distance between the most and the least cut unit, where a row has one and none is given


@SHARES.register()
def uniform(dense: Dense) -> dict[str, float]:
    """The same share everywhere."""
    return dict.fromkeys(dense.units, dense.share)


@SHARES.register(reference="https://arxiv.org/abs/2412.15127")
def stability(dense: Dense) -> dict[str, float]:
    """By how much importances vary from text to text: units whose importances are unstable lose less, or more.

    The indicator is the mean over a unit's structures of std / mean over parts of the calibration data. Units of a
    kind are scaled to ±`spread` around the mean; `unstable` says which way.

    Our reading of the indicator of Tang et al., 2024, "SAAP", https://arxiv.org/abs/2412.15127, which no code shows.
    """
    spread = SPREAD if dense.config.spread is None else dense.config.spread
    sign = -1 if dense.config.unstable == "less" else 1
    found = {}
    for units in dense.kinds.values():
        variation = torch.stack([_variation(dense.importances_by_part[unit]) for unit in units])
        span = variation.max() - variation.min()
        scaled = (variation - variation.min()) / span if span > 0 else torch.zeros_like(variation)
        found |= dict(zip(units, (dense.share + sign * 2 * spread * (scaled - scaled.mean())).tolist()))
    return found


def _variation(importances: torch.Tensor) -> torch.Tensor:
    """Mean std / mean of importances, (parts, structures), over the parts: a float64 scalar."""
    importances = importances.double()
    mean = importances.mean(0)
    return torch.where(mean > 0, importances.std(0) / mean, 0.0).mean()


@SHARES.register("global", reference="https://arxiv.org/abs/2305.11627")
def global_(dense: Dense) -> dict[str, float]:
    """One order of all structures, of all kinds and blocks, by importance for what each costs: the first of it go.

    As with `global_pruning` of Ma et al., 2023, "LLM-Pruner", https://arxiv.org/abs/2305.11627; the cost is ours.
    """
    return _least_first(dense, dense.importances)


@SHARES.register(reference="https://arxiv.org/abs/2204.09656")
def fisher(dense: Dense) -> dict[str, float]:
    """One order of all structures by what the loss feels of each, for its cost, whatever importance chooses in a unit.

    The Fisher information, which means the same in all blocks, is that of Kwon et al., 2022, "A Fast Post-Training
    Pruning Framework for Transformers", https://arxiv.org/abs/2204.09656; here it is of weights, as `taylor_second`.
    """
    return _least_first(dense, dense.fisher)


def _least_first(dense: Dense, importances: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Unit -> the share of its structures that goes, where of all the least important for its cost goes first."""
    units = [unit for unit in dense.units if dense.sizes[unit].cost]
    worth = torch.cat([importances[unit].double() / dense.sizes[unit].cost for unit in units])
    owner = torch.cat([torch.full((len(dense.units[unit]),), place) for place, unit in enumerate(units)])
    order = worth.argsort(stable=True)
    counts, left = dict.fromkeys(dense.units, 0), dense.asked
    for place in owner[order].tolist():
        unit = units[place]
        size = dense.sizes[unit]
        if left < size.cost:
            break
        if counts[unit] < size.most:
            counts[unit] += 1
            left -= size.cost
    return {unit: count / len(dense.units[unit]) for unit, count in counts.items()}


@SHARES.register(reference="https://arxiv.org/abs/2411.19146")
def milp(dense: Dense) -> dict[str, float]:
    """The widths that lose least of what is added to the residual stream, by every unit's own error curve, exactly.

    Under the budget, and under those of `budgets` besides. The programme is that of Bercovich et al., 2024, "Puzzle",
    https://arxiv.org/abs/2411.19146; the curves are ours.
    """
    sizes = dense.sizes
    budgets = [Budget({unit: size.cost for unit, size in sizes.items()}, dense.asked, dense.config.cost, exact=True)]
    for name, share in dense.config.least.items():
        cost = dense.costs[name]
        budgets.append(Budget(cost.each, int(share * cost.total), cost.what))
    counts = least_error(dense.curves, sizes, budgets)
    return {unit: count / len(dense.units[unit]) for unit, count in counts.items()}


def shares(dense: Dense) -> dict[str, float]:
    """Unit -> the share of its structures that the configuration's allocation asks to go."""
    allocation = dense.config.allocation
    if allocation == "uniform" and any(each.entire for each in dense.units.values()):
        return first_to_go(dense)
    if isinstance(allocation, str) and allocation in SHARES:
        proposed = SHARES[allocation](dense)
        return {unit: proposed[unit] for unit in dense.units}
    if (given := given_allocation(allocation)) is not None:
        return _given(dense, given)
    found = allocator_of(allocation)
    measured, proposed = dense.measured(str(allocation), found), {}
    # Kinds have importances of their own, that tell nothing beside those of another.
    for units in dense.kinds.values():
        proposed |= found.propose({unit: measured[unit] for unit in units}, dense.share, dense.config.spread)
    return {unit: proposed[unit] for unit in dense.units}


def given_allocation(allocation: str | Allocation) -> Allocation | None:
    """An allocation that is given, as an object or by where it lies; `None` where it is computed."""
    if isinstance(allocation, Allocation):
        return allocation
    computed = allocation in SHARES or allocator_of(allocation) is not None
    return None if computed else Allocation.load(allocation, "structured")


def allocator_of(allocation: str | Allocation) -> Allocator | None:
    """What computes an allocation that is no row here; `None` where it is given.

    Raises:
        UnknownNameError: there is no such name.
        OSError: there is no such file.
    """
    if allocation == AUTO:
        raise ValueError(
            f"allocation={AUTO!r} compares allocations of single weights; name one of {', '.join(SHARES)}, or search."
        )
    try:
        # It knows names, functions, files and repositories.
        found = DSAConfig(0.5, allocation=allocation).allocator
    except UnknownNameError:
        known = sorted({*SHARES, *measured_in_one_walk()})
        raise UnknownNameError(
            f"Unknown allocation {allocation!r}.{near(allocation, known)} Known: {', '.join(known)}."
        ) from None
    if getattr(found, "reads", None) == "model":
        raise ValueError(
            f"allocation={allocation!r} runs the model with single weights masked, and knows nothing of structures; "
            f"name one of {', '.join(dict.fromkeys([*SHARES, *measured_in_one_walk()]))}."
        )
    return found


def _given(dense: Dense, allocation: Allocation) -> dict[str, float]:
    """The shares of an allocation that is given, held against the model and the target."""
    given = allocation.sparsity
    missing, unknown = [unit for unit in dense.units if unit not in given], [u for u in given if u not in dense.units]
    if missing or unknown:
        raise ValueError(
            f"The allocation does not fit the structures of the model: it lacks {missing[:3] or 'nothing'} and names "
            f"{unknown[:3] or 'nothing'} that the model does not have."
        )
    for unit, size in dense.sizes.items():
        if size.allowed(given[unit] * size.count + 1e-6) < int(given[unit] * size.count + 1e-6):
            raise ValueError(
                f"The allocation takes {given[unit]:.4f} of {unit}, of which {size.most} of {size.count} can go, in "
                f"steps of {size.round_to}; lower its share."
            )
    total = dense.costs[dense.config.cost].total
    goes = sum(int(given[unit] * size.count + 1e-6) * size.cost for unit, size in dense.sizes.items())
    step = max(size.cost * size.round_to for size in dense.sizes.values())
    if abs(goes - dense.asked) > max(5e-4 * total, step):
        raise ValueError(
            f"The allocation takes {goes / total:.4f} of the blocks, but the config asks for "
            f"{dense.config.sparsity:g}; use sparsity={goes / total:.4f}."
        )
    return dict(given)
