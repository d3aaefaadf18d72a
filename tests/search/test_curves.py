"""Budget moved by error curves, on losses whose best allocation is known."""

import math

import pytest
import torch

from optimum_dsa.search.curves import GRID, RATES, balanced, curves, rates_of
from optimum_dsa.search.problem import UNIFORM, Budget
from optimum_dsa.search.space import Candidate

from .toy import Bowl, play, toy_problem


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_it_ends_where_one_more_weight_costs_the_same_everywhere():
    problem = toy_problem(sizes=(4000, 4000, 2000, 10000), budget=Budget(tokens=100 * 4 * 2048))
    bowl = Bowl(problem, costs=(1.0, 2.0, 1.5, 1.2))
    found, asked = play(curves(problem), problem, bowl.loss, bowl.slopes, bowl.errors)
    shares = bowl.shares(found[0].counts)
    assert [cost * share for cost, share in zip((1.0, 2.0, 1.5, 1.2), shares)] == pytest.approx([0.638] * 4, rel=0.02)
    assert all(sum(candidate.counts) == 10_000 for candidate in found if candidate.counts)
    assert found[-1] == UNIFORM
    kinds = [request.kind for request in asked]
    assert kinds[: 2 + len(GRID)] == ["anchor", "slopes", *["errors"] * len(GRID)]


def test_curves_that_nobody_knows_end_it_where_it_began():
    problem = toy_problem()
    found, _ = play(curves(problem), problem, lambda counts: 9.0, lambda counts: (1.0, 2.0, 3.0, 4.0))
    assert found == [Candidate("curves", counts=problem.resolver.counts(UNIFORM)), UNIFORM]


def test_the_rate_of_an_exponential_curve_is_its_exponent():
    shares = column(0.5, 0.55, 0.6, 0.7)[:, None].expand(4, 3)
    exponents = column(5.0, 8.0, 50.0)
    errors = torch.exp(exponents * shares)
    assert rates_of(shares, errors).tolist() == pytest.approx([5.0, 8.0, RATES[1]], rel=0.03)
    assert rates_of(shares, errors * 0).tolist() == [RATES[0]] * 3


def test_what_is_balanced_costs_the_same_and_keeps_the_budget():
    shares, slopes, rates = column(0.6, 0.7, 0.8), column(1.0, math.e, 1.5), column(5.0, 10.0, 8.0)
    sizes = column(100, 200, 400)
    moved = balanced(shares, slopes, rates, sizes, 1.0)
    costs = slopes * torch.exp(rates * (moved - shares))
    assert costs.tolist() == pytest.approx([costs[0].item()] * 3, rel=1e-6)
    assert (moved * sizes).sum().item() == pytest.approx((shares * sizes).sum().item())
    near = balanced(shares, slopes, rates, sizes, 0.02)
    assert ((near - shares).abs() <= 0.02 + 1e-9).all()
    assert balanced(shares, column(1, 1, 1), rates, sizes, 1.0).tolist() == pytest.approx(shares.tolist())
    assert balanced(shares, column(-1, -2, -1), rates, sizes, 1.0).isfinite().all()
