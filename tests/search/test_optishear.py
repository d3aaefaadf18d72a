"""NSGA-III keeps fronts and spreads over them; its individuals are metrics and ratios of blocks."""

import random
from itertools import product

import pytest

from optimum_dsa.pruning.unstructured.symbolic import Expression
from optimum_dsa.search.optishear import SCALES, SHAPES, STEP, Individual, fronts, survivors

from .searching import run


def test_fronts_are_those_of_the_definition():
    rng = random.Random(0)
    costs = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(60)]
    found = fronts(costs)
    assert sorted(place for front in found for place in front) == [*range(60)]

    def beats(a, b):
        return costs[a] != costs[b] and all(x <= y for x, y in zip(costs[a], costs[b]))

    for number, front in enumerate(found):
        assert not any(beats(a, b) for a in front for b in front)
        assert number == 0 or all(any(beats(a, b) for a in found[number - 1]) for b in front)


def test_survivors_are_whole_fronts_and_then_who_stands_apart():
    line = [(float(i), 20.0 - i) for i in range(21)]
    worse = [(x + 30, y + 30) for x, y in line]
    assert set(survivors(line + worse, 21, random.Random(0))) == {*range(21)}
    kept = survivors(line, 5, random.Random(0))
    assert len(set(kept)) == 5
    crowd = [(10.0 + i / 1000, 10.0 - i / 1000) for i in range(20)]
    assert {0, 1} <= set(survivors([(0.0, 20.0), (20.0, 0.0), *crowd], 4, random.Random(0)))
    assert survivors(line[:3], 5, random.Random(0)) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_individuals_are_drawn_and_crossed_within_their_lists(seed):
    rng = random.Random(seed)
    a, b = Individual.drawn(4, rng), Individual.drawn(4, rng)
    for one in (a, b, *(a.child(b, rng) for _ in range(50))):
        assert len(one.ratios) == 4 and set(one.ratios) <= {0, 1, 2}
        assert {*Expression.parse(one.metric).leaves} == {"W", "X"}
        assert [round((share - 0.7) / STEP) for share in one.shares(0.7)] == [ratio - 1 for ratio in one.ratios]


def test_wanda_and_relative_importance_are_forms():
    assert Individual((0, 0, 0, 0), ()).metric == "mul(X, abs(W))"
    assert "column_sum" in Individual((0, 1, 3, 0), ()).metric and "row_sum" in Individual((0, 1, 3, 0), ()).metric
    every = {Individual(form, ()).metric for form in product(range(7), range(7), range(4), range(4))}
    assert len(SHAPES) * len(SHAPES) < len(every) <= len(SHAPES) ** 2 * len(SCALES) ** 2


def test_a_search_meets_the_budget_exactly_and_finds_a_metric_with_it():
    result = run("optishear", "2k tokens", finalists=2)
    assert all(row.allocation.overall == pytest.approx(0.7, abs=1e-4) for row in result.finalists)
    assert {row.candidate.metric is None for row in result.finalists} == {True, False}
    blocks = {trial.counts for trial in result.trace.trials if trial.request.candidate.metric}
    assert len(blocks) > 5
