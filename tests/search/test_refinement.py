"""Budget moved between matrices, on losses whose best allocation is known."""

import itertools
import math

import pytest

from optimum_dsa.search.problem import Budget
from optimum_dsa.search.refinement import descent, level_switch
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import Request, Trial

from .toy import Bowl, play, toy_problem


COSTS = (1.0, 2.0, 1.5, 1.2)


def kinds(asked):
    return [request.kind for request in asked]


def test_descent_ends_where_one_more_weight_costs_the_same_everywhere():
    problem = toy_problem()
    bowl = Bowl(problem, COSTS)
    start = problem.resolver.counts(Candidate())
    found, _ = play(descent(problem), problem, bowl.loss, bowl.slopes)
    shares = bowl.shares(found[0].counts)
    assert bowl.loss(found[0].counts) < bowl.loss(start)
    assert [cost * share for cost, share in zip(COSTS, shares)] == pytest.approx([0.638] * 4, rel=0.05)
    assert sum(found[0].counts) == sum(start)
    assert Candidate() in found[1:3]


def test_the_first_step_of_descent_is_the_damped_logarithm_of_the_slopes():
    """Half the matrices cost e times as much as the others: 30 % of a step of 5 % either way from their middle."""
    problem = toy_problem(sizes=(1000,) * 4, budget=Budget(tokens=10**9))
    steps = descent(problem_at(problem, Candidate()))
    next(steps)
    steps.send([None])
    (request,) = steps.send([answer((1.0, 1.0, math.e, math.e))])
    assert [count - 500 for count in request.candidate.counts] == pytest.approx([7.5, 7.5, -7.5, -7.5], abs=1)


def test_steps_shrink_to_a_tenth_as_the_budget_runs_out_from_where_descent_began():
    """Ten passes of forty are spent before, another ten are kept for others."""
    window = 4 * 2048
    problem = toy_problem((10**6,) * 4, Budget(tokens=120 * window, spent_tokens=30 * window)).with_share(0.75)
    slopes = (1.0, 1.0, math.e, math.e)
    found, asked = play(descent(problem_at(problem, Candidate())), problem, lambda counts: 1.0, lambda counts: slopes)
    points = [request.candidate.counts[0] for request in asked if request.kind == "slopes"] + [found[1].counts[0]]
    steps = [(b - a) / 10**6 for a, b in itertools.pairwise(points)]
    expected = [0.05 * (0.1 + 0.9 * (1 - k / 20)) * (1 - 0.7 ** (k + 1)) * 0.5 for k in range(20)]
    assert steps == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "slopes,pull",
    [
        ((1.0, 1.0, 1e9, 1.0), [-1.5, -1.5, 1.5, -1.5]),
        ((1.0, 1.0, -5.0, 1.0), [math.log(10) / 4, math.log(10) / 4, -1.5, math.log(10) / 4]),
        ((-1.0, -2.0, -1.0, -1.0), [0.0] * 4),
    ],
)
def test_a_pull_is_bounded_and_a_slope_below_a_tenth_of_the_median_counts_as_that(slopes, pull):
    steps = descent(problem_at(toy_problem((10**6,) * 4, Budget(tokens=10**9)), Candidate()))
    next(steps)
    steps.send([None])
    (request,) = steps.send([answer(slopes)])
    moved = [(500_000 - count) / (10**6 * 0.05 * 0.3) for count in request.candidate.counts]
    # the budget stays: all are moved back by the mean
    assert moved == pytest.approx([value - sum(pull) / 4 for value in pull], abs=1e-3)


def problem_at(problem, start):
    problem.start = start
    return problem


def answer(slopes):
    return Trial(0, Request("slopes", Candidate()), 1.0, slopes)


def test_descent_goes_round_the_windows_and_takes_its_scores_anew_after_every_five_passes():
    problem = problem_at(toy_problem(windows=40, budget=Budget(tokens=3 * 12 * 16 * 2048)), Candidate())
    bowl = Bowl(problem, COSTS)
    _, asked = play(descent(problem), problem, bowl.loss, bowl.slopes)
    passes = [request for request in asked if request.kind == "slopes"]
    assert [(each.start, each.stop) for each in passes] == [(0, 16), (16, 32)] * 6
    assert kinds(asked) == ["anchor", *["slopes"] * 5] * 2 + ["anchor", *["slopes"] * 2]
    for anchor, first in zip(asked, asked[1:]):
        if anchor.kind == "anchor":
            assert anchor.candidate.counts == first.candidate.counts


def test_descent_returns_the_mean_of_its_last_quarter_and_its_last_point():
    """On slopes that never change, so that all points of its way are apart."""
    problem = problem_at(toy_problem((10_000,) * 4, Budget(tokens=3 * 13 * 4 * 2048)), Candidate())
    found, asked = play(descent(problem), problem, lambda counts: 1.0, lambda counts: (1.0, 1.0, 2.0, 2.0))
    passes = [request.candidate.counts for request in asked if request.kind == "slopes"]
    assert len(passes) == 13 and found[2] == Candidate()
    # then where the passes led to, latest first, should there be room for more finalists
    assert [candidate.counts for candidate in found[3:]] == passes[:0:-1]
    late = [*passes[-2:], found[1].counts]  # three of the thirteen points that the passes led to
    mean = [sum(column) / 3 for column in zip(*late)]
    assert all(abs(a - b) <= 1 for a, b in zip(found[0].counts, mean))
    assert min(abs(a - b) for a, b in itertools.pairwise(point[0] for point in late)) > 20
    short = problem_at(toy_problem((10_000,) * 4, Budget(tokens=3 * 3 * 4 * 2048)), Candidate())
    found, _ = play(descent(short), short, lambda counts: 1.0, lambda counts: (1.0, 1.0, 2.0, 2.0))
    # a quarter of three is one: the mean is the last point, and that is one finalist
    assert found[0].counts is not None and found[1] == Candidate() and len(found) == 4


def test_descent_stops_where_slopes_cannot_be_had():
    problem = problem_at(toy_problem(), Candidate())
    found, asked = play(descent(problem), problem, lambda counts: None)
    assert kinds(asked) == ["anchor", "slopes"]
    assert found == [Candidate()]  # where nothing was moved there is nothing new to rank


@pytest.mark.parametrize("strategy", [descent, level_switch])
def test_without_a_start_the_best_of_the_named_is_the_start(strategy):
    problem = toy_problem(named=("owl", "atp"))
    bowl = Bowl(problem, COSTS)
    problem.resolver.known = {"owl": (240, 160, 100, 500), "atp": (160, 240, 100, 500)}
    running = strategy(problem)
    requests = next(running)
    while requests[0].kind == "loss":
        losses = [(each, problem.resolver.counts(each.candidate)) for each in requests]
        requests = running.send([Trial(0, each, bowl.loss(c), counts=c) for each, c in losses])
    assert [each.candidate.function for each, _ in losses] == ["owl", "uniform"]
    (anchor,) = requests
    assert anchor.kind == "anchor" and anchor.candidate.counts == (240, 160, 100, 500)


def test_level_switch_keeps_the_total_and_goes_as_far_as_the_bounds():
    problem = toy_problem((20, 20, 50), Budget(tokens=300 * 2048), min_sparsity=0.44, max_sparsity=0.56)
    start = problem.resolver.counts(Candidate())
    _, asked = play(level_switch(problem), problem, Bowl(problem, COSTS).loss)
    tried = {request.candidate.counts for request in asked if request.candidate.counts}
    assert {sum(counts) for counts in tried} == {sum(start)}
    first, second, third = zip(*tried)
    assert (min(first), max(first)) == (min(second), max(second)) == (9, 11)
    assert (min(third), max(third)) == (23, 27)


def test_level_switch_moves_whole_quanta_between_few_matrices():
    problem = problem_at(toy_problem(sizes=(400,) * 9), Candidate())
    strategy = level_switch(problem, offspring=64)
    (anchor,) = next(strategy)
    requests = strategy.send([None])
    parent, *children = [request.candidate.counts for request in requests]
    assert anchor.kind == "anchor" and anchor.candidate.counts == parent and len(children) == 64
    moved = [[a - b for a, b in zip(child, parent)] for child in children]
    assert all(sum(move) == 0 and any(move) for move in moved)
    single = [move for move in moved if sum(map(bool, move)) == 2]
    # 5 % of a matrix, twice and four times that; twice that again where a pair was drawn twice
    assert {20, 40, 80} <= {max(move) for move in single} <= {20, 40, 80, 160}
    assert all(amount % 20 == 0 for move in moved for amount in move)
    assert max(sum(map(bool, move)) for move in moved) in (4, 5, 6)
    assert len(single) > len(moved) / 2  # the lower of two draws from one to three


def test_the_number_of_switches_is_the_lower_of_two_draws_from_one_to_three():
    problem = problem_at(toy_problem(sizes=(400,) * 60), Candidate())
    strategy = level_switch(problem, offspring=1000)
    next(strategy)
    parent, *children = [request.candidate.counts for request in strategy.send([None])]
    moved = [sum(a != b for a, b in zip(child, parent)) for child in children]
    single, most = moved.count(2) / 1000, max(moved)
    assert most == 6 and single == pytest.approx(5 / 9, abs=0.025)


def test_level_switch_finds_what_costs_less_and_moves_its_anchor_there():
    problem = problem_at(toy_problem(budget=Budget(tokens=3000 * 2048)), Candidate())
    bowl = Bowl(problem, COSTS)
    found, asked = play(level_switch(problem), problem, bowl.loss)
    slopes = bowl.slopes(found[0].counts)
    assert max(slopes) / min(slopes) < 1.1 and found[1] == Candidate()
    losses = [bowl.loss(candidate.counts) for candidate in found[2:]]
    assert losses == sorted(losses)  # the way there, latest first
    anchors = [index for index, request in enumerate(asked) if request.kind == "anchor"]
    losses = [bowl.loss(asked[index].candidate.counts) for index in anchors]
    assert len(anchors) > 3 and losses == sorted(losses, reverse=True)
    generations = [sum(request.start == 0 for request in asked[a:b]) for a, b in itertools.pairwise(anchors)]
    assert set(generations[:2]) <= set(range(12 * 17, 12 * 17 + 13))


def test_level_switch_moves_at_least_what_both_matrices_can_change_by():
    problem = problem_at(toy_problem(sizes=(400, 400, 800)), Candidate())
    problem.resolver.steps = (50, 50, 100)
    strategy = level_switch(problem, offspring=64)
    next(strategy)
    parent, *children = [request.candidate.counts for request in strategy.send([None])]
    moved = [[a - b for a, b in zip(child, parent)] for child in children]
    single = [[abs(amount) for amount in move] for move in moved if sum(map(bool, move)) == 2]
    assert {min(filter(None, move)) for move in single if not move[2]} >= {50, 80}
    assert min(move[2] for move in single if move[2]) == 100


def test_one_matrix_has_nothing_to_give():
    problem = problem_at(toy_problem(sizes=(100,), budget=Budget(tokens=30 * 2048)), Candidate())
    found, _ = play(level_switch(problem), problem, lambda counts: 1.0)
    assert found[0].counts == (50,)
