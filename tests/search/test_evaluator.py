"""What is asked, what is computed, and what it costs, with an objective that only notes it."""

import math

import pytest
import torch

from optimum_dsa.common.ranks import Ranks
from optimum_dsa.search.evaluator import Answer, Evaluator
from optimum_dsa.search.problem import Room
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import NO_ROOM, Request, Trial


LENGTH = 16
A, B = (Candidate("a", counts=(3, 4)), Candidate("b", counts=(5, 2)))


class Noted:
    """An objective whose loss is the mean of the windows' numbers, and where the anchor is added."""

    def __init__(self, windows=10):
        self.validation, self.batch_size = torch.zeros(windows, LENGTH), 4
        self.anchor, self.calls = None, []

    def move_anchor(self, counts):
        self.anchor = counts

    def take_metric(self, metric):
        self.calls += [] if metric is None else [("metric", metric)]

    def value(self, rows):
        return sum(rows) / len(rows) + (sum(self.anchor.values()) if self.anchor else 0)

    def loss(self, counts, rows):
        self.calls.append(("loss", counts, rows))
        return self.value(rows)

    def slopes(self, counts, rows):
        self.calls.append(("slopes", counts, rows))
        return self.value(rows), {"n": 0.25, "m": 0.5}

    def sequential(self, counts, rows):
        self.calls.append(("sequential", counts, rows))
        return self.value(rows), 7.0


class Names:
    sizes = {"m": 10, "n": 10}

    def removed(self, candidate):
        if candidate.counts is None:
            raise ValueError(f"{candidate.function} is impossible")
        return candidate.counts


@pytest.fixture
def evaluator():
    return Evaluator(Noted(), Names())


def test_a_backward_pass_costs_as_much_as_two_forward_ones(evaluator):
    requests = [Request("loss", A, 2, 5), Request("slopes", A, 2, 5), Request("sequential", A, 2, 5)]
    forward, both, final = evaluator.answer(requests, 7)
    assert forward.tokens == final.tokens == 3 * LENGTH and both.tokens == 3 * forward.tokens
    assert [trial.number for trial in (forward, both, final)] == [7, 8, 9]
    assert both.slopes == (0.5, 0.25) and final.perplexity == 7.0
    assert forward.slopes is None and forward.perplexity is both.perplexity is None
    assert min(forward.seconds, both.seconds, final.seconds) > 0


def test_what_is_known_is_not_computed_again_and_costs_nothing(evaluator):
    first, again, other = evaluator.answer(
        [Request("loss", A, 0, 4), Request("loss", A, 0, 4), Request("loss", B, 0, 4)], 0
    )
    assert (first.tokens, again.tokens, other.tokens) == (4 * LENGTH, 0, 4 * LENGTH) and again.seconds == 0.0
    assert first.loss == again.loss and len(evaluator.objective.calls) == 2
    (later,) = evaluator.answer([Request("loss", A, 0, 4)], 3)
    assert (later.loss, later.tokens) == (first.loss, 0) and len(evaluator.objective.calls) == 2
    (rows,) = evaluator.answer([Request("loss", A, 0, 3)], 4)
    assert rows.tokens == 3 * LENGTH


def test_batches_are_joined_by_their_windows(evaluator):
    (trial,) = evaluator.answer([Request("loss", A, 1, 10)], 0)
    assert [rows for _, _, rows in evaluator.objective.calls] == [range(1, 5), range(5, 9), range(9, 10)]
    assert trial.loss == pytest.approx(5.0) and trial.tokens == 9 * LENGTH
    assert evaluator.objective.calls[0][1] == {"m": 3, "n": 4}
    evaluator.objective.calls.clear()
    evaluator.answer([Request("slopes", A, 0, 9), Request("sequential", A, 0, 9)], 1)
    assert [rows for _, _, rows in evaluator.objective.calls] == [range(0, 9)] * 2


def test_another_anchor_is_another_question_but_not_for_the_sequential_prune(evaluator):
    asked = [Request("loss", A, 0, 1), Request("sequential", A, 0, 1)]
    before = evaluator.answer(asked, 0)
    (anchor,) = evaluator.answer([Request("anchor", B)], 2)
    assert (anchor.loss, anchor.tokens, anchor.counts, anchor.error) == (None, 0, (5, 2), None)
    after = evaluator.answer(asked, 3)
    assert before[0].loss == 0 and after[0].loss == 7 and after[0].tokens == LENGTH
    assert (after[1].loss, after[1].tokens) == (before[1].loss, 0)
    evaluator.answer([Request("anchor", Candidate("dense", counts=(0, 0)))], 5)
    (dense,) = evaluator.answer([Request("loss", A, 0, 1)], 6)
    assert (dense.loss, dense.tokens) == (0, 0)


def test_a_sequential_prune_leaves_the_anchor_where_it_was(evaluator):
    evaluator.answer([Request("anchor", A)], 0)
    evaluator.answer([Request("sequential", B, 0, 1)], 1)
    assert evaluator.objective.anchor == {"m": 3, "n": 4}


def test_what_is_impossible_or_no_number_is_an_error_without_a_loss(evaluator, monkeypatch):
    monkeypatch.setattr(evaluator.objective, "loss", lambda counts, rows: math.nan)
    impossible, broken = evaluator.answer([Request("loss", Candidate("er"), 0, 2), Request("loss", A, 0, 2)], 0)
    assert (impossible.error, impossible.loss, impossible.tokens) == ("er is impossible", None, 0)
    assert (broken.error, broken.loss, broken.tokens) == ("the loss is not a number", None, 2 * LENGTH)
    (anchor,) = evaluator.answer([Request("anchor", Candidate("er"))], 2)
    assert anchor.error == "er is impossible"


def test_replayed_trials_are_known(evaluator):
    evaluator.replay(Trial(0, Request("anchor", B), counts=(5, 2)))
    evaluator.replay(Trial(1, Request("slopes", A, 0, 4), 1.5, (0.1, 0.2), 64, 1.0, (3, 4)))
    evaluator.replay(Trial(2, Request("loss", A, 0, 4), None, counts=(3, 4), error="the loss is not a number"))
    assert evaluator.objective.anchor == {"m": 5, "n": 2}
    known, new = evaluator.answer([Request("slopes", A, 0, 4), Request("loss", A, 0, 4)], 3)
    assert (known.loss, known.slopes, known.tokens) == (1.5, (0.1, 0.2), 0)
    assert new.tokens == 4 * LENGTH and new.loss == 1.5 + 7


@pytest.mark.parametrize("ranks,computed", [(Ranks(0, 3), [range(0, 4)]), (Ranks(3, 4), [range(8, 9)])])
def test_ranks_share_the_batches_and_who_has_none_does_the_last_as_well(evaluator, ranks, computed, monkeypatch):
    """What comes back is everybody's answers one after the other: those of the extra work stand behind."""

    def gather(own):
        (answer,) = own
        assert (answer.loss, answer.slopes, answer.perplexity) == (evaluator.objective.value(computed[0]), None, None)
        return [[Answer(float(index), seconds=0.5)] for index in range(3)] + [own]

    monkeypatch.setattr(ranks, "gather", gather)
    evaluator.ranks = ranks
    (trial,) = evaluator.answer([Request("loss", A, 0, 9)], 0)
    assert [rows for _, _, rows in evaluator.objective.calls] == computed
    assert (trial.loss, trial.seconds) == ((4 * 0 + 4 * 1 + 1 * 2) / 9, 1.5)


C = Candidate("c", counts=(6, 1))


@pytest.mark.parametrize(
    "room,computed",
    [
        (Room(), 3), (Room(tokens=12 * LENGTH), 3), (Room(tokens=12 * LENGTH - 1), 2), (Room(tokens=3), 0),
        (Room(evaluations=1), 1), (Room(evaluations=0), 0), (Room(seconds=0.0), 0), (Room(seconds=1e9), 3),
    ],
)  # fmt: skip
def test_what_there_is_no_room_for_is_not_computed_and_says_so(room, computed, evaluator):
    trials = evaluator.answer([Request("loss", each, 0, 4) for each in (A, B, C)], 0, room)
    assert [trial.error for trial in trials] == [None] * computed + [NO_ROOM] * (3 - computed)
    assert [trial.tokens for trial in trials] == [4 * LENGTH] * computed + [0] * (3 - computed)
    assert len(evaluator.objective.calls) == computed
    assert [trial.counts for trial in trials] == [(3, 4), (5, 2), (6, 1)]


def test_what_is_known_is_answered_without_room(evaluator):
    known = evaluator.answer([Request("loss", B, 0, 4)], 0)[0]
    first, again = evaluator.answer([Request("loss", A, 0, 4), Request("loss", B, 0, 4)], 1, Room(tokens=0))
    assert first.error == NO_ROOM and (again.loss, again.tokens, again.error) == (known.loss, 0, None)


def test_seconds_are_looked_at_between_two_computations(evaluator, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("optimum_dsa.search.evaluator.time.perf_counter", lambda: next(clock))
    trials = evaluator.answer([Request("loss", each, 0, 4) for each in (A, B, C)], 0, Room(seconds=1.5))
    assert [trial.error for trial in trials] == [None, None, NO_ROOM]
