"""No more parameters go than were asked for, and no share that could be nearer is left."""

import random

import pytest

from optimum_dsa.pruning.structured.budget import Available, even_counts, fitted_counts


def total(units, counts):
    return sum(units[name].cost * number for name, number in counts.items())


def drawn(seed):
    chance = random.Random(seed)
    return {
        f"block.{number}": Available(chance.randint(1, 40), chance.randint(1, 50), chance.choice([1, 1, 4, 8]))
        for number in range(chance.randint(1, 12))
    }


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_held_and_nothing_more_would_fit(seed):
    units = drawn(seed)
    most = sum(unit.most * unit.cost for unit in units.values())
    asked = random.Random(seed).randint(0, most)
    counts = fitted_counts(units, asked)
    assert total(units, counts) <= asked
    for name, unit in units.items():
        stays = unit.count - counts[name]
        assert stays >= 1 and (counts[name] == 0 or stays % unit.round_to == 0)
        step = unit.next(counts[name])
        assert step == counts[name] or total(units, {**counts, name: step}) > asked


def test_shares_are_alike():
    units = {str(number): Available(100, 3) for number in range(4)}
    assert fitted_counts(units, 3 * 50) == {"0": 13, "1": 13, "2": 12, "3": 12}


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match="101 parameters are to go, and of the structures that may only 90 can"):
        fitted_counts({"a": Available(10, 10)}, 101)


def test_nothing_asked_takes_nothing():
    assert fitted_counts(drawn(1), 0) == dict.fromkeys(drawn(1), 0)


def test_units_of_a_kind_lose_one_number():
    units = {
        f"{kind}.{number}": Available(count, cost)
        for kind, count, cost in (("a", 30, 2), ("b", 4, 17))
        for number in range(3)
    }
    counts = even_counts({name: name[0] for name in units}, units, 200)
    assert {name[0]: number for name, number in counts.items()} == {"a": counts["a.2"], "b": counts["b.1"]}
    assert 200 - 3 * 2 < total(units, counts) <= 200
