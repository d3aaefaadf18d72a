"""The widths that lose least by error curves, under one budget or several: an integer programme, solved exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ....common.installation import how_to_install
from ..budget import Available, too_little


LEVELS = 64  # numbers of structures of a unit that are told apart
SECONDS = 60.0  # after which the best that is known is taken


@dataclass(frozen=True)
class Budget:
    """How much of one cost goes.

    Attributes:
        each (`Mapping[str, int]`): unit -> what one of its structures costs.
        asked (`int`): how much is to go.
        what (`str`): that is counted.
        exact (`bool`): whether no more may go, and as near to it as can; otherwise it is the least that goes.
    """

    each: Mapping[str, int]
    asked: int
    what: str
    exact: bool = False


def least_error(
    curves: Mapping[str, Tensor], units: Mapping[str, Available], budgets: Sequence[Budget]
) -> dict[str, int]:
    """Unit -> how many of its structures go, so that the sum of all errors is the least within all budgets.

    min Σ_u e_u(n_u), one number n_u being chosen for each unit u among at most `LEVELS` of those that can go.

    Args:
        curves (`Mapping[str, Tensor]`): unit -> its error by number of structures that go, (structures + 1,).

    Raises:
        ImportError: scipy is not installed.
        ValueError: no widths meet all budgets.

    The programme of Bercovich et al., 2024, "Puzzle", https://arxiv.org/abs/2411.19146, section 4.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError(
            f"allocation='milp' is solved by scipy: {how_to_install('milp')}; or use another allocation, such as "
            "'global'."
        ) from error
    levels = {name: _levels(unit) for name, unit in units.items()}
    pairs = [(name, number) for name, numbers in levels.items() for number in numbers]
    places = {name: place for place, name in enumerate(units)}
    one = csr_array((np.ones(len(pairs)), ([places[name] for name, _ in pairs], range(len(pairs)))))
    constraints = [LinearConstraint(one, 1, 1)]
    for budget in budgets:
        row = np.array([[float(budget.each[name] * number) for name, number in pairs]])
        # Numbers between the levels are filled in afterwards: within the widest gap of one unit the budget is met.
        gap = max(
            (budget.each[name] * (b - a) for name, all_ in levels.items() for a, b in zip(all_, all_[1:])), default=0
        )
        most = sum(unit.most * budget.each[name] for name, unit in units.items())
        if most < budget.asked:
            raise ValueError(too_little(budget.asked, most, budget.what))
        low = budget.asked - gap if budget.exact else budget.asked
        constraints.append(LinearConstraint(row, low, budget.asked if budget.exact else np.inf))
    errors = np.array([float(curves[name][number]) for name, number in pairs])
    # By its largest, so that the solver's tolerances mean the same for any model.
    errors = errors / max(errors.max(initial=0.0), 1e-30)
    found = milp(
        errors,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-4},
    )
    if found.x is None:
        asked = ", ".join(
            f"{'at most' if budget.exact else 'at least'} {budget.asked:,} {budget.what}" for budget in budgets
        )
        raise ValueError(
            f"No widths were found that meet all budgets at once, of {asked} to go ({found.message}); lower those of "
            "budgets, or raise sparsity."
        )
    return {name: number for (name, number), chosen in zip(pairs, found.x) if chosen > 0.5}


def _levels(unit: Available) -> list[int]:
    """Numbers of structures that can go, ascending from 0, at most about `LEVELS`, evenly."""
    return sorted({unit.allowed(unit.most * step / LEVELS) for step in range(LEVELS + 1)} | {0})
