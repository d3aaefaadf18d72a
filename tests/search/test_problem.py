"""Budgets, races and rankings."""

import random

import pytest

from optimum_dsa.search.problem import IDLE, Budget, Problem, Ranked, distinct, merge, parse_budget, pass_windows, race
from optimum_dsa.search.space import Candidate, SearchSpace
from optimum_dsa.search.trace import Request, Trial

from .toy import play, toy_problem


def trial(tokens=0, seconds=0.0):
    return Trial(0, Request("loss", Candidate()), 1.0, tokens=tokens, seconds=seconds)


def candidates(*counts):
    return [Candidate(f"c{index}", counts=count) for index, count in enumerate(counts)]


def test_the_nearest_limit_says_what_share_is_spent():
    budget = Budget(tokens=100, evaluations=10, seconds=8.0)
    assert budget.share == 0
    budget.add(trial(20, 1.0))
    assert (budget.spent_tokens, budget.spent_evaluations, budget.spent_seconds) == (20, 1, 1.0)
    assert budget.share == 0.2
    budget.add(trial(0, 1.0))  # known already: no evaluation
    assert (budget.spent_evaluations, budget.share) == (1, 0.25)
    for _ in range(4):
        budget.add(trial(1))
    assert budget.share == 0.5
    assert Budget().share == 0


@pytest.mark.parametrize(
    "text,limits",
    [
        ("3 k tokens", (3000, None, None)), ("2.5M", (2_500_000, None, None)), ("1", (1, None, None)),
        ("7 s", (None, None, 7)), ("1k evaluations", (None, 1000, None)), (".5 h", (None, None, 1800)),
        ("0.25 min", (None, None, 15)), ("5. s", (None, None, 5)),
    ],
)  # fmt: skip
def test_units_of_budgets(text, limits):
    budget = parse_budget(text)
    assert (budget.tokens, budget.evaluations, budget.seconds) == limits
    assert parse_budget(budget) is budget


@pytest.mark.parametrize("text", ["1.2.3 tokens", "0.4 tokens", "0.9 evaluations", "0 s", ".", "k tokens", "0.0001k"])
def test_a_budget_of_nothing_is_none(text):
    with pytest.raises(ValueError, match="expected '2M tokens'"):
        parse_budget(text)


@pytest.mark.parametrize(
    "windows,length,rungs",
    [
        (100, 16, (100,)),
        (1000, 16, (128, 512)),
        (64, 2048, (1, 4)),
        (2, 2048, (1, 2)),
        (9, 5000, (1,)),
        (64, 512, (4, 16)),
    ],
)
def test_races_begin_with_2k_and_8k_tokens_within_what_there_is(windows, length, rungs):
    assert toy_problem(windows=windows, length=length).rungs == rungs


def test_a_problem_is_over_when_its_share_is_spent_or_nothing_new_is_found():
    problem = toy_problem(budget=Budget(tokens=100))
    half = problem.with_share(0.5)
    problem.budget.add(trial(49))
    assert not half.over and not problem.over
    problem.budget.add(trial(1))
    assert half.over and not problem.over
    assert half.with_share(0.9).until == 0.5 and half.with_share(0.2).until == 0.2
    for _ in range(IDLE - 1):
        problem.budget.add(trial())
    assert not problem.over
    problem.budget.add(trial())
    assert problem.over
    assert not problem.with_share(1.0).over  # a stage of its own looks anew
    for _ in range(IDLE - 1):
        problem.budget.add(trial())
    problem.budget.add(trial(1))
    problem.budget.add(trial())
    assert problem.budget.idle == 1 and not problem.over


def test_a_race_keeps_its_best_share_and_compares_over_all_windows_that_were_met():
    """Losses by window: what looks best on the first is not on all."""
    problem = toy_problem(windows=4, length=2048)
    assert problem.rungs == (1, 4)
    first, later = [5.0, 1.0, 2.0, 4.0, 3.0, 6.0], [0.0, 4.0, 2.0, 0.0, 9.0, 0.0]
    asked = []
    running = race(problem, candidates(*[(index,) for index in range(6)]), keep=0.5)
    requests = next(running)
    asked += requests
    trials = [Trial(0, r, first[r.candidate.counts[0]], counts=r.candidate.counts) for r in requests]
    requests = running.send(trials)
    assert [(r.start, r.stop) for r in asked] == [(0, 1)] * 6
    assert [(r.candidate.counts, r.start, r.stop) for r in requests] == [((1,), 1, 4), ((2,), 1, 4), ((4,), 1, 4)]
    with pytest.raises(StopIteration) as end:
        running.send([Trial(0, r, later[r.candidate.counts[0]], counts=r.candidate.counts) for r in requests])
    ranking = end.value.value
    assert [ranked.counts for ranked in ranking] == [(2,), (1,), (4,), (3,), (0,), (5,)]
    assert [ranked.windows for ranked in ranking] == [4, 4, 4, 1, 1, 1]
    assert [ranked.loss for ranked in ranking] == [2.0, (1 + 3 * 4) / 4, (3 + 3 * 9) / 4, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("number,keep,kept", [(10, 0.34, 4), (9, 0.01, 2), (1, 0.01, 1), (5, 1.0, 5)])
def test_at_least_two_go_on(number, keep, kept):
    problem = toy_problem(windows=4, length=2048)
    ranking, asked = play(
        race(problem, candidates(*[(index,) for index in range(number)]), keep), problem, lambda counts: counts[0]
    )
    assert sum(request.start == 1 for request in asked) == kept
    assert [ranked.counts[0] for ranked in ranking] == list(range(number))


@pytest.mark.parametrize(
    "room,windows",
    [
        (6 + 3 * 6, [4] * 6),  # all
        (6 + 2 * 3 + 2, [4, 4, 3, 1, 1, 1]),  # the third has two windows of the rung that is left
        (6 + 3 + 1, [4, 2, 1, 1, 1, 1]),
        (6 + 3, [4, 1, 1, 1, 1, 1]),
        (6 + 2, [2, 2, 1, 1, 1, 1]),  # nobody has the whole rung: the best two share what is left
        (6 + 1, [1] * 6),
    ],
)
def test_whom_a_rung_is_too_large_for_meets_what_fits_of_it(room, windows):
    problem = toy_problem(windows=4, length=2048, budget=Budget(tokens=room * 2048))
    assert problem.rungs == (1, 4)
    six = candidates(*[(index,) for index in range(6)])
    ranking, _ = play(race(problem, six, keep=1.0), problem, lambda counts: 1.0 + counts[0], kept=True)
    assert [ranked.windows for ranked in ranking] == windows
    assert [ranked.counts[0] for ranked in ranking] == list(range(6))
    assert problem.budget.spent_tokens == min(sum(windows) * 2048, problem.budget.tokens)
    assert problem.budget.tokens - problem.budget.spent_tokens <= 2048


def test_what_is_impossible_drops_out_of_a_race():
    problem = toy_problem(windows=4, length=2048)
    ranking, _ = play(
        race(problem, candidates((1,), (2,), (3,)), 1.0), problem, lambda counts: None if counts == (2,) else 1.0
    )
    assert [ranked.counts for ranked in ranking] == [(1,), (3,)]


def test_who_met_more_windows_stands_before_who_looks_better_on_fewer():
    few, many, worse = (
        Ranked(Candidate(), (1,), 0.1, 1),
        Ranked(Candidate(), (2,), 0.5, 4),
        Ranked(Candidate(), (3,), 0.9, 4),
    )
    assert merge([few], [worse, many]) == [many, worse, few]


def test_an_allocation_is_ranked_once_at_its_best_place():
    ranking = [Ranked(Candidate("a"), (1,)), Ranked(Candidate("b"), (2,)), Ranked(Candidate("c"), (1,))]
    assert [ranked.candidate.function for ranked in distinct(ranking)] == ["a", "b"]
    again = merge([Ranked(Candidate("a"), (1,), 0.3, 2)], [Ranked(Candidate("b"), (1,), 0.2, 2)])
    assert [ranked.candidate.function for ranked in again] == ["b"]


def test_a_problem_draws_from_its_own_source():
    problem = toy_problem(seed=3)
    assert problem.rng.random() == random.Random(3).random()
    assert isinstance(problem, Problem) and isinstance(problem.space, SearchSpace)


@pytest.mark.parametrize("usual", [1, 3, 8, 30])
def test_passes_share_out_the_budget_and_leave_less_than_a_quarter_of_one(usual):
    for room in (2, 3, 40, 75, 100, 115, 271, 1000):
        problem = toy_problem(windows=8, length=10, budget=Budget(tokens=room * 10))
        seen = []
        while windows := pass_windows(problem, usual):
            problem.budget.add(trial(3 * windows * 10))
            seen.append(windows)
        assert 0 <= problem.budget.tokens - problem.budget.spent_tokens < 3 * 10 * max(min(usual, 8) / 4, 1)
        assert all(windows <= 8 for windows in seen)
        if room >= 3 * min(usual, 8):
            assert min(seen) >= min(usual, 8) / 2


def test_without_a_limit_of_tokens_passes_are_as_long_as_usual():
    assert pass_windows(toy_problem(windows=8, length=10, budget=Budget(seconds=9.0)), 3) == 3
    assert pass_windows(toy_problem(windows=8, length=10, budget=Budget(evaluations=9)), 30) == 8


@pytest.mark.parametrize(
    "text,limits",
    [
        ("2M tokens", (2_000_000, None, None)), ("2M", (2_000_000, None, None)), (5000, (5000, None, None)),
        ("500 evaluations", (None, 500, None)), ("1.5 min", (None, None, 90)), ("2 h", (None, None, 7200)),
    ],
)  # fmt: skip
def test_budgets_are_read_as_they_are_written(text, limits):
    budget = parse_budget(text)
    assert (budget.tokens, budget.evaluations, budget.seconds) == limits


@pytest.mark.parametrize("text", ["", "much", "-3", "0 tokens", "3 parsecs"])
def test_a_budget_that_cannot_be_read_says_how_to_write_one(text):
    with pytest.raises(ValueError, match="expected '2M tokens'"):
        parse_budget(text)
