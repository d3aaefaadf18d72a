"""Scores projected onto a budget: as much goes as was asked for and fits, the lowest first."""

import pytest
import torch

from optimum_dsa.pruning.structured.budget import Available
from optimum_dsa.pruning.structured.learners.budget import Projection
from optimum_dsa.pruning.structured.learners.policy_gradient import projected


def drawn(sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {unit: torch.rand(size.count, generator=draw) for unit, size in sizes.items()}


SIZES = {
    "a:ffn": Available(40, 30),
    "b:ffn": Available(24, 30),
    "a:head": Available(4, 170),
    "b:head": Available(4, 170),
}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.8])
@pytest.mark.parametrize("round_to", [1, 8])
def test_no_more_goes_than_asked_and_nothing_more_would_fit(share, round_to):
    sizes = {unit: Available(s.count, s.cost, round_to if "ffn" in unit else 1) for unit, s in SIZES.items()}
    asked = int(share * sum(size.count * size.cost for size in sizes.values()))
    kept = Projection(sizes, asked).keep(scores := drawn(sizes))
    gone = {unit: int((~stays).sum()) for unit, stays in kept.items()}
    cost = sum(count * sizes[unit].cost for unit, count in gone.items())
    assert cost <= asked
    for unit, size in sizes.items():
        assert gone[unit] <= size.most and gone[unit] == size.allowed(gone[unit])
        after = size.next(gone[unit])
        assert after == gone[unit] or cost + (after - gone[unit]) * size.cost > asked
        if gone[unit] > 0:
            assert scores[unit][~kept[unit]].max() <= scores[unit][kept[unit]].min()


def test_where_all_cost_the_same_the_lowest_of_all_go():
    sizes = {unit: Available(20, 10) for unit in "abc"}
    scores = drawn(sizes)
    kept = Projection(sizes, 250).keep(scores)
    stay = torch.cat([scores[unit][kept[unit]] for unit in sizes])
    go = torch.cat([scores[unit][~kept[unit]] for unit in sizes])
    assert len(go) == 25 and go.max() < stay.min()


def test_one_stays_however_low_it_scores():
    sizes = {"low": Available(5, 1), "high": Available(5, 1)}
    kept = Projection(sizes, 6).keep({"low": torch.arange(5.0), "high": 100 + torch.arange(5.0)})
    assert int(kept["low"].sum()) == 1 and kept["low"][4] and int(kept["high"].sum()) == 3


def test_counts_that_are_settled_are_kept():
    kept = Projection(SIZES, 10**6, {"a:ffn": 3, "b:ffn": 0, "a:head": 1, "b:head": 2}).keep(drawn(SIZES))
    assert [int((~kept[unit]).sum()) for unit in SIZES] == [3, 0, 1, 2]


@pytest.mark.parametrize("most", [0.5, 3, 7.25, 100])
def test_the_projection_is_the_nearest_point_of_the_set(most):
    """Against a solution by the conditions of optimality: in between, all were lowered by one number."""
    values = torch.randn(20, generator=torch.Generator().manual_seed(2)) + 0.6
    found = projected(values, most)
    assert found.min() >= 0 and found.max() <= 1 and found.sum() <= most + 1e-5
    inside = (found > 1e-6) & (found < 1 - 1e-6)
    shifts = (values - found)[inside]
    assert shifts.numel() > 0 and (shifts - shifts[0]).abs().max() < 1e-5
    assert shifts[0] >= -1e-6 and (shifts[0] < 1e-5 or found.sum().item() == pytest.approx(most, abs=1e-4))
    assert ((values - shifts[0]).clamp(0, 1) - found).abs().max() < 1e-5
