"""Which finalists there are, and how far the budget lets them be looked at."""

import pytest

from optimum_dsa.search.finals import FinalRound, choose, rank
from optimum_dsa.search.problem import UNIFORM, Budget, Room
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import NO_ROOM, Trial

from .toy import Matrices, toy_problem


LENGTH = 16
WHOLE = FinalRound(4, 8, 8)  # 5 x 16 windows


def test_with_room_for_all_it_is_the_whole_round():
    for budget in (Budget(tokens=5 * 16 * LENGTH), Budget(evaluations=10), Budget(seconds=1.0), Budget()):
        assert WHOLE.within(budget, LENGTH) == WHOLE and WHOLE.note(WHOLE) is None


WHOLES = [WHOLE, FinalRound(2, 8, 3), FinalRound(0, 8, 8), FinalRound(9, 100, 20), FinalRound(4, 8, 0)]


@pytest.mark.parametrize("whole", WHOLES)
def test_a_small_budget_is_never_exceeded_and_well_used(whole):
    for tokens in range(4 * LENGTH, 6 * 16 * LENGTH, 7):
        budget = Budget(tokens=tokens)
        final = whole.within(budget, LENGTH)
        prunes = (final.finalists + 1) * final.windows * LENGTH
        assert prunes + final.besides(budget, LENGTH).tokens == tokens  # what they leave over is for the proxies
        assert 1 <= final.windows <= whole.windows and final.proxy_windows == whole.proxy_windows
        assert min(whole.finalists, 1) <= final.finalists <= whole.finalists
        one_more = (final.finalists + 1) * (final.windows + 1) * LENGTH
        assert final.windows == whole.windows or one_more > tokens


def test_of_the_smallest_round_nothing_is_left_out():
    small = Budget(tokens=10)
    assert WHOLE.within(small, LENGTH) == FinalRound(1, 1, 8)
    assert WHOLE.within(small, LENGTH).besides(small, LENGTH) == Room(0)
    assert WHOLE.within(Budget(evaluations=1), LENGTH) == FinalRound(1, 8, 8)
    assert WHOLE.within(Budget(tokens=1000, spent_tokens=2000), LENGTH) == FinalRound(1, 1, 8)
    assert "room for 1 of 4 finalists besides uniform and 1 of 8 validation windows after" in FinalRound(1, 1, 8).note(
        WHOLE
    )


def test_a_prune_is_an_evaluation_and_a_proxy_another_where_there_is_room():
    budget = Budget(evaluations=7)
    assert WHOLE.within(budget, LENGTH) == WHOLE and WHOLE.besides(budget, LENGTH) == Room(None, 2)
    assert WHOLE.within(Budget(evaluations=3), LENGTH) == FinalRound(2, 8, 8)


@pytest.mark.parametrize(
    "whole,tokens,evaluations",
    [(WHOLE, 5 * 16, 10), (FinalRound(4, 8, 8, met=True), 5 * 8, 5), (FinalRound(4, 8, 0), 5 * 8, 5)],
)
def test_room_is_kept_for_what_will_be_computed_alone(whole, tokens, evaluations):
    """A proxy that the races have met costs nothing, and where nothing races there is none."""
    budget = Budget(tokens=1000 * LENGTH)
    assert whole.reserved(budget, LENGTH) == tokens / 1000
    assert whole.reserved(Budget(evaluations=100), LENGTH) == evaluations / 100
    assert whole.reserved(Budget(tokens=LENGTH), LENGTH) == 0.5
    # Of a small budget they would be too much, and the prunes come first.
    assert whole.reserved(Budget(tokens=200 * LENGTH), LENGTH) == 40 / 200
    assert whole.reserved(Budget(evaluations=20), LENGTH) == 5 / 20
    assert whole.reserved(Budget(seconds=9.0), LENGTH) == whole.reserved(Budget(), LENGTH) == 0.1


class Named(Matrices):
    """Candidates by name, as `Resolver.removed` gives them."""

    def removed(self, candidate):
        return self.counts(candidate)

    def allocation(self, counts, name):
        return tuple(counts)


@pytest.fixture
def resolver():
    found = Named((20, 20), toy_problem((20, 20)).resolver.config)
    found.known = {"owl": (8, 12), "atp": (9, 11), "dlp": (8, 12)}
    return found


def descended(*counts):
    return Candidate("descent", counts=counts)


def test_an_allocation_is_a_finalist_once_and_by_its_name(resolver):
    ranking = [descended(8, 12), descended(7, 13), Candidate("owl"), Candidate("dlp"), Candidate("atp")]
    assert choose(ranking, resolver, 4) == [Candidate("owl"), descended(7, 13), Candidate("atp"), UNIFORM]
    assert choose(ranking, resolver, 1) == [Candidate("owl"), UNIFORM]
    assert choose([descended(10, 10)], resolver, 4) == [UNIFORM]
    assert choose([], resolver, 4) == [UNIFORM]


def test_finalists_meet_the_prune_and_the_proxy_rung_by_rung(resolver):
    problem = toy_problem((20, 20), windows=4, length=2048)
    problem.resolver = resolver
    asked = []

    def serve(requests, room=None):
        asked.extend(requests)
        losses = {"owl": 2.0, "uniform": 1.0, "dense": None}
        return [
            Trial(0, each, losses[each.candidate.function] + each.start, None, 0, 0.0, resolver.counts(each.candidate))
            if each.kind != "anchor"
            else Trial(0, each)
            for each in requests
        ]

    table = rank(serve, problem, [Candidate("owl")], FinalRound(4, 4, 4))
    assert [(row.candidate, row.loss) for row in table] == [(UNIFORM, 1.0), (Candidate("owl"), 2.0)]
    assert [(each.kind, each.start, each.stop) for each in asked[1:]] == [
        *[("loss", 0, 1)] * 2, *[("loss", 1, 4)] * 2, *[("sequential", 0, 4)] * 2
    ]  # fmt: skip
    assert not problem.notes
    assert [row.proxy for row in table] == [(1 * 1.0 + 3 * 2.0) / 4, (1 * 2.0 + 3 * 3.0) / 4]


@pytest.mark.parametrize("fits,proxy", [(4, (1 + 2 + 2 + 2) / 4), (1, 1.0), (0, None)])
def test_proxies_are_of_the_windows_that_all_have_room_for_beside_the_prunes(fits, proxy, resolver):
    """Losses by window are 1, 2, 2, 2; `fits` windows of each have room."""
    problem = toy_problem((20, 20), windows=4, length=2048)
    problem.resolver, prunes = resolver, 2 * 4 * 2048
    problem.budget = Budget(tokens=prunes + 2 * fits * 2048)

    def serve(requests, room=None):
        trials = []
        for each in requests:
            held = room is None or room().holds(len(each.rows) * 2048, 1)
            loss = None if each.kind == "anchor" or not held else 1.0 + (each.start > 0)
            cost = len(each.rows) * 2048 if loss is not None else 0
            counts = resolver.counts(each.candidate)
            trials.append(Trial(0, each, loss, None, cost, 0.0, counts, None if held else NO_ROOM))
            problem.budget.add(trials[-1])
        return trials

    table = rank(serve, problem, [Candidate("owl")], FinalRound(4, 4, 4))
    assert [row.proxy for row in table] == [proxy] * 2 and len(table) == 2
    assert problem.budget.spent_tokens == problem.budget.tokens and not problem.notes


def test_where_nothing_raced_by_a_proxy_none_is_asked_for(resolver):
    problem = toy_problem((20, 20), windows=4, length=2048)
    problem.resolver, asked = resolver, []

    def serve(requests, room=None):
        asked.extend(requests)
        return [Trial(0, each, 1.0, counts=resolver.counts(each.candidate)) for each in requests]

    table = rank(serve, problem, [Candidate("owl")], FinalRound(4, 4, 0))
    assert {each.kind for each in asked} == {"sequential"} and [row.proxy for row in table] == [None] * 2


@pytest.mark.parametrize("seconds,pruned", [(0.5, 2), (2.5, 3), (3.5, 4), (60.0, 4)])
def test_a_budget_of_time_ends_the_last_round_behind_the_best_and_uniform(seconds, pruned, resolver):
    problem = toy_problem((20, 20), budget=Budget(seconds=seconds), windows=1, length=2048)
    problem.resolver = resolver

    def serve(requests, room=None):
        trials = [
            Trial(0, each, 1.0, seconds=float(each.kind == "sequential"), counts=resolver.counts(each.candidate))
            for each in requests
        ]
        for trial in trials:
            problem.budget.add(trial)
        return trials

    ranking = [descended(7, 13), Candidate("owl"), Candidate("atp")]
    table = rank(serve, problem, ranking, FinalRound(4, 1, 1))
    kept = [descended(7, 13), UNIFORM, Candidate("owl"), Candidate("atp")][:pruned]
    assert {row.candidate for row in table} == set(kept)
    notes = [] if pruned == 4 else [f"the budget had room for {pruned} of 4 finalists, uniform included"]
    assert problem.notes == notes
