"""Which finalists there are, and how far the budget lets them be looked at."""

import pytest

from optimum_dsa.search.finals import FinalRound, choose, rank
from optimum_dsa.search.problem import UNIFORM, Budget
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import Trial

from .toy import Matrices, toy_problem


LENGTH = 16
WHOLE = FinalRound(4, 8, 8)  # 5 x 16 windows


def test_with_room_for_all_it_is_the_whole_round():
    for budget in (Budget(tokens=5 * 16 * LENGTH), Budget(evaluations=10), Budget(seconds=1.0), Budget()):
        assert WHOLE.within(budget, LENGTH) == WHOLE and WHOLE.note(WHOLE) is None


@pytest.mark.parametrize("whole", [WHOLE, FinalRound(2, 8, 3), FinalRound(0, 8, 8), FinalRound(9, 100, 20)])
def test_a_small_budget_is_never_exceeded_and_well_used(whole):
    for tokens in range(4 * LENGTH, 6 * 16 * LENGTH, 7):
        final = whole.within(Budget(tokens=tokens), LENGTH)
        assert final.tokens(LENGTH) <= tokens
        assert 1 <= final.windows <= whole.windows and 1 <= final.proxy_windows <= whole.proxy_windows
        assert min(whole.finalists, 1) <= final.finalists <= whole.finalists
        one_more = FinalRound(final.finalists, final.windows + 1, final.proxy_windows + 1)
        assert final == whole or one_more.tokens(LENGTH) > tokens


def test_of_the_smallest_round_nothing_is_left_out():
    assert WHOLE.within(Budget(tokens=10), LENGTH) == FinalRound(1, 1, 1)
    assert WHOLE.within(Budget(evaluations=1), LENGTH) == FinalRound(1, 8, 8)
    assert WHOLE.within(Budget(tokens=1000, spent_tokens=2000), LENGTH) == FinalRound(1, 1, 1)
    assert "room for 1 of 4 finalists besides uniform and 1 of 8 validation windows after" in FinalRound(1, 1, 1).note(
        WHOLE
    )


def test_evaluations_are_two_for_each():
    assert WHOLE.within(Budget(evaluations=7), LENGTH) == FinalRound(2, 8, 8)


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

    def serve(requests):
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


@pytest.mark.parametrize("seconds,pruned", [(0.5, 2), (2.5, 3), (3.5, 4), (60.0, 4)])
def test_a_budget_of_time_ends_the_last_round_behind_the_best_and_uniform(seconds, pruned, resolver):
    problem = toy_problem((20, 20), budget=Budget(seconds=seconds), windows=1, length=2048)
    problem.resolver = resolver

    def serve(requests):
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
