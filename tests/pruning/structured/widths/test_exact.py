"""The widths of least error are those that trying all of them finds."""

import itertools
import random
import sys

import pytest
import torch

from optimum_dsa.pruning.structured.budget import Available
from optimum_dsa.pruning.structured.widths.exact import Budget, least_error


pytest.importorskip("scipy")


def drawn(seed):
    chance = random.Random(seed)
    units = {f"u{number}": Available(chance.randint(2, 6), chance.randint(1, 5)) for number in range(4)}
    curves = {
        name: torch.tensor([0.0, *sorted(chance.uniform(0, 9) for _ in range(unit.count))]).double()
        for name, unit in units.items()
    }
    return units, curves, {name: unit.cost for name, unit in units.items()}


def best(units, curves, allowed):
    """The least error of all widths that are `allowed`."""
    return min(
        sum(float(curves[name][number]) for name, number in zip(units, numbers))
        for numbers in itertools.product(*(range(unit.most + 1) for unit in units.values()))
        if allowed(dict(zip(units, numbers)))
    )


def cost(each, counts):
    return sum(each[name] * number for name, number in counts.items())


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_widths(seed):
    units, curves, each = drawn(seed)
    asked = sum(unit.most * unit.cost for unit in units.values()) // 2
    other = {name: 1 + number % 2 for number, name in enumerate(units)}
    least = sum(unit.most * other[name] for name, unit in units.items()) // 2
    budgets = [Budget(each, asked, "parameters", exact=True), Budget(other, least, "bytes")]
    gap = max(each.values())
    for number in (1, 2):
        counts = least_error(curves, units, budgets[:number])

        def allowed(counts, number=number):
            return asked - gap <= cost(each, counts) <= asked and (number == 1 or cost(other, counts) >= least)

        assert allowed(counts)
        assert sum(float(curves[n][c]) for n, c in counts.items()) == pytest.approx(best(units, curves, allowed))


def test_budgets_that_contradict_each_other_are_refused():
    units, curves, each = drawn(0)
    budgets = [Budget(each, 2, "parameters", exact=True), Budget(each, 9, "bytes")]
    with pytest.raises(ValueError, match="meet all budgets at once, of at most 2 parameters, at least 9 bytes to go"):
        least_error(curves, units, budgets)
    for free, said in ((each, "may only .* can; lower the share"), (dict.fromkeys(each, 0), "has none of them")):
        with pytest.raises(ValueError, match=f"900 bytes are to go, and .*{said}"):
            least_error(curves, units, [budgets[0], Budget(free, 900, "bytes")])


def test_round_widths_stay_round():
    units = {name: Available(64, 1, round_to=16) for name in "ab"}
    curves = {name: torch.arange(65).double() * slope for name, slope in (("a", 1), ("b", 2))}
    counts = least_error(curves, units, [Budget({"a": 1, "b": 1}, 64, "parameters", exact=True)])
    assert counts == {"a": 48, "b": 0}


def test_without_scipy_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    units, curves, each = drawn(0)
    with pytest.raises(ImportError, match="allocation='milp' is solved by scipy"):
        least_error(curves, units, [Budget(each, 2, "parameters", exact=True)])
