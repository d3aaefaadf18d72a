"""Orders of channels for N:M: every row gives an order, and keeps no less than the order that was there."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa import PERMUTATIONS
from optimum_dsa.pruning.unstructured import permutations
from optimum_dsa.pruning.unstructured.assignment import best_assignment
from optimum_dsa.pruning.unstructured.patterns import Pattern
from optimum_dsa.pruning.unstructured.permutations import Channels, retained


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch):
    monkeypatch.setattr(permutations, "STEPS", 20)


def scores(rows=24, channels=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, channels, generator=generator) * torch.rand(channels, generator=generator).exp()


def channels(given, kept, width):
    """Of inputs that have nothing to do with each other, so that the error is what is removed, squared."""
    return Channels(given, kept, width, given[None], torch.eye(given.shape[1])[None])


@pytest.mark.parametrize("name", sorted(PERMUTATIONS))
@pytest.mark.parametrize(
    "kept,width,number", [(2, 4, 96), (4, 8, 96), (3, 4, 72), (1, 4, 4), (6, 8, 136), (8, 16, 80)]
)
def test_every_row_gives_an_order_and_leaves_the_scores_alone(name, kept, width, number):
    given, before = scores(channels=number), scores(channels=number)
    order = PERMUTATIONS[name](channels(given, kept, width))
    assert torch.equal(order.sort().values, torch.arange(number)) and torch.equal(given, before)
    assert torch.equal(order, PERMUTATIONS[name](channels(given, kept, width)))  # the same every time


@pytest.mark.parametrize("name", sorted(PERMUTATIONS))
def test_what_can_be_kept_whole_is(name):
    """Half of the channels are worth nothing, and stand together."""
    given = scores(channels=32)
    given[:, 16:] = 0
    order = PERMUTATIONS[name](channels(given, 2, 4))
    most = retained(given[:, order], 2, 4) / given.sum().item()
    assert retained(given, 2, 4) / given.sum().item() < 0.75 and most > (0.85 if name == "learned" else 0.9999)


@pytest.mark.parametrize("seed", range(3))
def test_exchange_keeps_no_less_than_ria_and_learned_loses_less_than_the_order_as_it_is(seed):
    given = scores(seed=seed)
    squares = [
        retained(given[:, order].square(), 2, 4)
        for order in (slice(None), PERMUTATIONS["learned"](channels(given, 2, 4)))
    ]
    kept = {name: retained(given[:, PERMUTATIONS[name](channels(given, 2, 4))], 2, 4) for name in PERMUTATIONS}
    assert kept["exchange"] >= kept["ria"] > retained(given, 2, 4) and squares[1] > squares[0]


def test_groups_are_assigned_in_parts_without_a_loss(monkeypatch):
    given, whole = scores(), PERMUTATIONS["ria"](channels(scores(), 2, 4))
    monkeypatch.setattr(permutations, "TOGETHER", 7)
    order = PERMUTATIONS["ria"](channels(given, 2, 4))
    assert torch.equal(order.sort().values, torch.arange(96)) and not torch.equal(order, whole)
    assert retained(given[:, order], 2, 4) > retained(given, 2, 4)


def test_what_is_retained_is_what_the_pattern_keeps():
    given = scores()
    keep = Pattern.parse("3:8").keep(given, 0)
    assert retained(given, 3, 8) == pytest.approx(given[keep].sum().item(), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5), seed=st.integers(0, 99), ties=st.booleans())
def test_an_assignment_is_the_best_of_all(size, seed, ties):
    gains = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    gains = gains.round() if ties else gains
    place = best_assignment(gains)
    every = itertools.permutations(range(size))
    most = max(sum(gains[who, at].item() for who, at in enumerate(places)) for places in every)
    assert sorted(place.tolist()) == list(range(size))
    assert gains[range(size), place].sum().item() == pytest.approx(most, abs=1e-4)
