"""A grid holds the zeros and only them, is nearer the better its scales are, and is found again in its weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.packed.grid import SCALES, Grid, grid_of, largest, nearest, to_grid

from .test_matrix import sparse


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (0, 32, 128)


@settings(max_examples=20, deadline=None)
@given(
    *(st.integers(1, 40), st.integers(1, 300), st.integers(0, 99)),
    *(st.sampled_from((4, 8)), st.sampled_from(GROUPS), st.sampled_from(sorted(SCALES)), st.sampled_from(FLOATS)),
)
def test_what_lies_on_a_grid_is_found_there_bit_for_bit(rows, columns, seed, bits, group, scales, dtype):
    weight = sparse(rows, columns, seed, dtype) * 0.02
    grid = to_grid(weight, bits, group, scales)
    assert torch.equal(grid.numbers != 0, weight != 0) and int(grid.numbers.abs().max()) <= largest(bits)
    assert torch.equal(grid.scales.bfloat16().float(), grid.scales) and bool((grid.scales > 0).all())
    on_it = grid.weights(dtype)
    found = grid_of(on_it, bits)
    assert found is not None and torch.equal(found.weights(dtype), on_it)
    assert found.group >= grid.group or found.group == 0
    # Half a step at most, but for what is cut off, and for what would be no weight any more.
    if scales == "absmax" and dtype == torch.float32:
        step = grid.scales.repeat_interleave(group or columns, dim=1)[:, :columns]
        assert bool(((on_it - weight).abs() <= step * torch.where(weight.abs() < step, 1, 0.76)).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_lies_on_none_is_not_found(bits, dtype):
    weight = sparse(40, 300, 0, dtype)
    assert grid_of(weight, bits) is None
    on_it = to_grid(weight, bits, 32).weights(dtype)
    on_it[-1] = weight[-1]
    assert grid_of(on_it, bits) is None
    on_it = to_grid(weight, bits).weights(dtype)
    on_it[7, int(on_it[7].ne(0).nonzero()[-1])] = float("nan")
    assert grid_of(on_it, bits) is None
    assert grid_of(torch.zeros(3, 4).fill_(-0.0), bits) is None  # whose bits would be lost
    assert grid_of(weight.double(), bits) is grid_of(weight[:0], bits) is None


def test_the_least_squares_are_no_worse_and_importance_moves_them_to_where_it_is():
    weight = sparse(64, 256, 1)
    importance = torch.ones(256)
    importance[:16] = 1000

    def lost(grid, columns=slice(None)):
        return float((grid.weights() - weight)[:, columns].square().sum())

    for group in GROUPS:
        plain, better = to_grid(weight, 4, group, "absmax"), to_grid(weight, 4, group, "mse")
        assert lost(better) < 0.95 * lost(plain)
        weighed = to_grid(weight, 4, group, "mse", importance)
        assert lost(weighed, slice(16)) < lost(better, slice(16)) and lost(weighed) > lost(better)


def test_smaller_groups_and_more_bits_are_nearer():
    weight = sparse(64, 512, 2) * torch.linspace(0.1, 3, 512)
    losses = [float((to_grid(weight, 4, group).weights() - weight).square().sum()) for group in (0, 128, 32)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2
    assert float((to_grid(weight, 8).weights() - weight).square().sum()) < losses[-1] / 20


def test_numbers_of_what_is_kept_are_not_zero_and_of_what_is_gone_are():
    weights = torch.tensor([[0.0, 1e-9, -1e-9, 5.0, -9.0, 2.0]])
    gone = torch.tensor([[False, False, False, False, False, True]])
    assert nearest(weights, torch.ones(1), 7, gone).tolist() == [[1, 1, -1, 5, -7, 0]]
    assert nearest(weights, torch.ones(1), 7).tolist() == [[0, 1, -1, 5, -7, 2]]


def test_rows_of_zeros_have_a_scale():
    weight = torch.zeros(3, 64)
    weight[1, 5] = 2
    grid = to_grid(weight, 4, 32)
    torch.testing.assert_close(grid.weights(), weight, rtol=1e-2, atol=0)
    assert bool(grid.scales.isfinite().all()) and torch.equal(grid_of(weight, 8).weights(), weight)


def test_weights_are_products_rounded_once():
    grid = Grid(torch.tensor([[127, -3, 0, 1]], dtype=torch.int8), torch.tensor([[0.0078125, 3.0]]), 2)
    assert grid.weights().tolist() == [[127 * 0.0078125, -3 * 0.0078125, 0, 3]]
    assert torch.equal(grid.weights(torch.bfloat16), grid.weights().bfloat16())
