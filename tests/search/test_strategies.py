"""What each strategy tries, on losses that are known: no model is run."""

import math
import random
import re

import pytest

from optimum_dsa import Calibration, DSAConfig
from optimum_dsa.search.enumeration import block_sizes, enumerate_space
from optimum_dsa.search.problem import UNIFORM, Budget, Problem
from optimum_dsa.search.realise import realise
from optimum_dsa.search.resolver import Resolver
from optimum_dsa.search.space import Candidate, SearchSpace
from optimum_dsa.search.strategies import STRATEGIES, auto, evolution, exhaustive, named, ramp, random_search

from ..tiny import tiny_llama, tokens
from .toy import play


@pytest.fixture(scope="module")
def resolver():
    model = tiny_llama(num_hidden_layers=4)
    calibration = Calibration({"input_ids": tokens()}, "x")
    config = DSAConfig(0.5)
    return Resolver(model, realise(model, calibration, config), calibration, config, ("owl", "dlp"))


@pytest.fixture
def problem(resolver):
    def make(budget, windows=4, length=2048, **changes):
        budget = Budget(tokens=budget * windows * length)
        space = SearchSpace(spreads=(0.02, 0.2))
        return Problem(space, resolver, windows, length, budget, ("owl", "dlp"), random.Random(0), **changes)

    return make


def tilt(resolver, best):
    """A loss that is least where the last block is pruned by `best` more than the first."""
    blocks = list(resolver.units["block"].values())
    place = {name: index for index, name in enumerate(resolver.sizes)}

    def share(counts, weights):
        return sum(counts[place[w.name]] for w in weights) / sum(w.size for w in weights)

    return lambda counts: (share(counts, blocks[-1]) - share(counts, blocks[0]) - best) ** 2 + 1


def functions(asked, kind="loss"):
    return [request.candidate.function for request in asked if request.kind == kind]


def test_named_tries_uniform_and_every_name_on_all_rungs(problem):
    asked_for = problem(1)
    found, asked = play(named(asked_for), asked_for, tilt(asked_for.resolver, 0.0))
    assert functions(asked[:3]) == ["uniform", "owl", "dlp"] and len(asked) == 6
    assert found[0] == UNIFORM and {candidate.function for candidate in found} <= {"uniform", "owl", "dlp"}


@pytest.mark.parametrize("best", [0.06, 0.23, 0.41, 0.9])
def test_a_ramp_is_found_to_a_fortieth(best, problem):
    """Its width is half the distance between the first block and the last."""
    asked_for = problem(10)
    found, asked = play(ramp(asked_for), asked_for, tilt(asked_for.resolver, best))
    assert found[0].function == "atp" and found[0].spread == pytest.approx(min(best / 2, 0.2375), abs=0.0126)
    widths = [request.candidate.spread for request in asked if request.start == 0]
    assert widths[:5] == [0.0, 0.05, 0.1, 0.15, 0.2] and len(widths) == len(set(widths)) <= 9
    losses = [tilt(asked_for.resolver, best)(asked_for.resolver.counts(candidate)) for candidate in found]
    assert losses == sorted(losses)


def test_a_ramp_is_never_turned_round(problem):
    asked_for = problem(10)
    found, asked = play(ramp(asked_for), asked_for, tilt(asked_for.resolver, -0.3))
    assert found[0].spread == 0 and min(request.candidate.spread for request in asked) == 0
    assert sorted({request.candidate.spread for request in asked})[:3] == [0, 0.0125, 0.025]


def test_random_search_draws_until_its_budget_is_spent_and_keeps_the_best(problem):
    asked_for = problem(30)
    loss = tilt(asked_for.resolver, 0.2)
    found, asked = play(random_search(asked_for), asked_for, loss)
    assert functions(asked)[0] == "uniform" and 0 < len(found) <= 8
    assert asked_for.budget.share >= 1
    finished = [request.candidate for request in asked if request.stop == 4]
    counts = asked_for.resolver.counts
    assert loss(counts(found[0])) == min(loss(counts(candidate)) for candidate in finished)
    losses = [loss(counts(candidate)) for candidate in found]
    assert losses == sorted(losses)
    drawn = [request for request in asked if request.start == 0][1:]
    assert len(drawn) % 16 == 0


def test_evolution_starts_with_the_names_and_what_it_is_given_and_breeds_better_ones(problem):
    start = Candidate("atp", 0.03)
    asked_for = problem(60, start=start)
    loss = tilt(asked_for.resolver, 0.3)
    found, asked = play(evolution(asked_for), asked_for, loss)
    first = [request.candidate for request in asked if request.start == 0]
    assert first[:4] == [UNIFORM, Candidate("owl"), Candidate("dlp"), start] and len(first) % 16 == 0
    counts = asked_for.resolver.counts
    generations = [[loss(counts(candidate)) for candidate in first[i : i + 16]] for i in range(0, len(first), 16)]
    assert loss(counts(found[0])) == min(map(min, generations)) < min(generations[0]) and len(found) <= 12
    known = set(first[:16])
    strangers = [candidate for candidate in first[16:32] if "/" in candidate.function][:3]
    assert len(strangers) == 3 and not known & set(strangers)


def test_evolution_does_not_breed_from_counts_which_have_no_genes(problem, resolver):
    start = Candidate("found elsewhere", counts=resolver.counts(Candidate("atp", 0.15)))
    asked_for = problem(20, start=start)
    found, asked = play(evolution(asked_for), asked_for, tilt(resolver, 0.3))
    assert found[0] == start
    assert [request.candidate for request in asked if request.candidate.counts] == [start] * 2


def test_evolution_without_room_still_draws_strangers(problem):
    asked_for = problem(1)
    _, asked = play(evolution(asked_for, population=2), asked_for, tilt(asked_for.resolver, 0.3))
    assert len([request for request in asked if request.start == 0][3:]) >= 3


@pytest.mark.parametrize(
    "limits,until,most",
    [
        ({"tokens": 16 * 900}, 1.0, 450),
        ({"tokens": 16 * 900}, 0.1, 45),
        ({"evaluations": 40}, 0.5, 10),
        ({}, 1.0, 2000),
    ],
)
def test_exhaustive_races_the_whole_space_as_fine_as_the_budget_allows(limits, until, most, problem, monkeypatch):
    reductions = ("mean", "var", "entropy", "geometric_mean", "frobenius_norm")
    small = SearchSpace(("abslog", "mms", "tanh"), reductions, ("atan", "exp", "sin"), ("no_op",), (1,), (0.08, 0.08))
    monkeypatch.setattr(SearchSpace, "published", classmethod(lambda cls: small))
    asked_for = problem(1, windows=70, length=16).with_share(until)
    asked_for.budget = Budget(**limits)
    found, asked = play(exhaustive(asked_for), asked_for, tilt(asked_for.resolver, 0.1))
    assert sorted({(request.start, request.stop) for request in asked}) == [(0, 1), (1, 4), (4, 16), (16, 64)]
    raced = [request.candidate for request in asked if request.start == 0]
    everything = enumerate_space(small, asked_for.resolver)
    assert raced[0] == UNIFORM and 1 < len(raced) - 1 <= most
    (note,) = asked_for.notes
    tolerance = float(re.search(r"differ by more than ([\d.]+)%", note)[1]) / 100
    if most > len(everything):
        assert len(raced) - 1 == len(everything) and tolerance == 0.0025
    else:  # half as coarse would be too many
        assert len(everything.merged(block_sizes(asked_for.resolver), tolerance / 2, most)) > most
    assert f"; {len(raced) - 1} that differ" in note and f" {len(everything)} distinct" in note
    second = [request for request in asked if request.start == 1]
    assert len(second) == max(math.ceil(0.15 * len(raced)), 2)
    assert len(found) == len({asked_for.resolver.counts(candidate) for candidate in found})


def test_auto_hands_the_best_of_each_stage_to_the_next(problem):
    asked_for = problem(120)
    loss = tilt(asked_for.resolver, 0.25)
    sizes = list(asked_for.resolver.sizes.values())
    found, asked = play(auto(asked_for), asked_for, loss, lambda counts: (1.0,) * len(sizes))
    kinds = functions(asked)
    assert kinds[:3] == ["uniform", "owl", "dlp"]
    order = [kinds.index("atp"), next(i for i, text in enumerate(kinds) if "/" in text)]
    assert order == sorted(order)
    assert functions(asked, "slopes")
    spent = 0
    for request in asked:
        if "/" in request.candidate.function:
            assert spent <= 0.3 * asked_for.budget.tokens + 16 * 4 * 2048
        spent += len(request.rows) * 2048 if request.kind == "loss" and "/" in request.candidate.function else 0
    counts = asked_for.resolver.counts
    first_pass = next(request for request in asked if request.kind == "slopes")
    assert loss(first_pass.candidate.counts) == min(
        loss(counts(request.candidate)) for request in asked if request.stop == 4 and request.kind == "loss"
    )
    # The slopes are equal: where it begins is where descent ends. Behind it the others, should there be room for them.
    assert counts(found[0]) == counts(found[1]) == counts(found[2])
    losses = [loss(counts(candidate)) for candidate in found[2:]]
    assert losses == sorted(losses) and len(losses) > 4


def test_a_budget_that_the_names_spend_is_not_spent_again_by_what_would_follow(problem):
    asked_for = problem(0.1)
    loss = tilt(asked_for.resolver, 0.0)
    found, asked = play(auto(asked_for), asked_for, loss, lambda counts: (1.0,) * len(counts))
    kinds = {(request.kind, request.candidate.function, request.start, request.stop) for request in asked}
    assert {kind for kind in kinds if kind[0] != "anchor"} == {
        ("loss", name, 0, 1) for name in ("uniform", "owl", "dlp")
    }
    assert UNIFORM in found


def test_strategies_that_try_no_names_say_so():
    without = {name for name in STRATEGIES if not STRATEGIES.fact(name, "named", True)}
    assert without == {"random", "exhaustive", "ramp", "curves", "symbolic", "optishear"}
