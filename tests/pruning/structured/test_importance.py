"""One number a structure: laws of every row, and what each row is."""

from dataclasses import replace

import pytest
import torch

from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.structured.gradients import Products
from optimum_dsa.pruning.structured.importance import CHANNELS, IMPORTANCES, Parts
from optimum_dsa.pruning.structured.refit import refit_columns


SIZE, OUT, HEADS = 12, 5, 4


def numbers(seed=0, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, SIZE, generator=generator) @ torch.randn(SIZE, SIZE, generator=generator) + 0.5
    return torch.randn(OUT, SIZE, generator=generator), torch.randn(SIZE, 7, generator=generator), inputs


def statistics(inputs):
    found = LayerStatistics(SIZE, with_gram=True, with_sum=True, sequences=1)
    found.update_(inputs)
    return found


def parts(reader, maker, inputs, columns, damping=1e-6):
    makes, reads = [maker[columns]], [reader.t()[columns]]
    return Parts(makes, reads, columns, statistics(inputs), damping, products(makes + reads, columns))


def products(owned, columns):
    """Of the gradients of three samples that are the same for the same column."""
    found = []
    for number, each in enumerate(owned):
        generator = torch.Generator().manual_seed(number)
        p = each * torch.randn(3, SIZE, each.shape[-1], generator=generator)[:, columns]
        mean, squares = p.mean(0), p.square().mean(0)
        sums = (mean.sum(-1), p.sum(-1).square().mean(0), squares.sum(-1))
        found.append(Products(*sums, mean.abs().sum(-1), (mean - squares / 2).abs().sum(-1)))
    return found


def heads():
    return torch.arange(SIZE).reshape(HEADS, -1)


# Rows that are a formula of what structures own, and those of which there is no order.
OWNED = sorted(name for name in IMPORTANCES if name != "random" and "ffn" in IMPORTANCES.fact(name, "kinds", CHANNELS))


@pytest.mark.parametrize("name", OWNED)
def test_the_order_of_structures_changes_nothing(name):
    reader, maker, inputs = numbers()
    order = torch.randperm(HEADS, generator=torch.Generator().manual_seed(1))
    found = IMPORTANCES[name](parts(reader, maker, inputs, heads()))
    assert found.shape == (HEADS,) and found.dtype == torch.float32 and (found >= 0).all()
    torch.testing.assert_close(IMPORTANCES[name](parts(reader, maker, inputs, heads()[order])), found[order])


@pytest.mark.parametrize("name", OWNED)
def test_what_nothing_reads_and_nothing_makes_is_least_important(name):
    reader, maker, inputs = numbers()
    reader[:, heads()[2]] = 0
    maker[heads()[2]] = 0
    found = IMPORTANCES[name](parts(reader, maker, inputs, heads()))
    assert found[2] == 0 and (found[[0, 1, 3]] > 0).all()


def test_chance_is_the_same_for_the_same_name_and_takes_none_for_sure():
    reader, maker, inputs = numbers()
    first, again, other = (
        IMPORTANCES["random"](replace(parts(reader, maker, inputs, torch.arange(SIZE)[:, None]), name=name))
        for name in ("0:layers.0:ffn", "0:layers.0:ffn", "1:layers.0:ffn")
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (SIZE,) and (first > 0).all() and first.unique().numel() == SIZE


@pytest.mark.parametrize("name", ["wanda_sp", "flap", "obs"])
def test_rows_that_read_inputs_know_of_no_makers(name):
    reader, maker, inputs = numbers()
    one, other = (parts(reader, each, inputs, heads()) for each in (maker, 3 * maker))
    assert torch.equal(IMPORTANCES[name](one), IMPORTANCES[name](other))


def test_an_input_that_never_changes_is_nothing_to_flap():
    reader, maker, inputs = numbers()
    inputs[:, heads()[1]] = 3.0
    found = IMPORTANCES["flap"](parts(reader, maker, inputs, heads()))
    assert found[1] < 1e-3 * found.max()
    assert IMPORTANCES["wanda_sp"](parts(reader, maker, inputs, heads()))[1] > 0


def test_obs_is_the_error_that_a_refit_leaves():
    reader, maker, inputs = numbers()
    found = IMPORTANCES["obs"](parts(reader, maker, inputs, heads()))
    for number, columns in enumerate(heads()):
        gone = torch.zeros(SIZE, dtype=torch.bool)
        gone[columns] = True
        new = refit_columns(reader, statistics(inputs), gone, 1e-6)
        error = ((inputs @ (new - reader).t()) ** 2).sum()
        torch.testing.assert_close(found[number], error, rtol=1e-3, atol=0)


def test_tyr_is_what_both_orders_lose():
    """Its first order is the slope of ½‖W·X‖² as a structure fades, and half its second the refit's error."""
    reader, maker, inputs = numbers()
    given = parts(reader, maker, inputs, heads(), damping=0.0)
    slopes = []
    for columns in heads():
        faded = torch.ones(SIZE, requires_grad=True)
        (0.5 * (inputs @ (reader * faded).t()).square().sum()).backward()
        slopes.append(faded.grad[columns].sum())
    expected = torch.stack(slopes) + IMPORTANCES["obs"](given) / 2
    expected = expected - expected.min().clamp_max(0)
    torch.testing.assert_close(IMPORTANCES["tyr"](given), expected, rtol=1e-3, atol=1e-2)


def test_tyr_of_columns_that_cancel_each_other_keeps_their_order():
    reader, maker, inputs = numbers()
    inputs[:, heads()[1]] = -0.9 * inputs[:, heads()[0]] + 0.1 * inputs[:, heads()[2]]
    reader[:, heads()[1]] = reader[:, heads()[0]]
    found = IMPORTANCES["tyr"](parts(reader, maker, inputs, heads(), damping=0.01))
    assert found.min() == 0 and found.isfinite().all() and found.unique().numel() == HEADS


def test_a_refit_is_the_least_squares_solution():
    reader, _, inputs = numbers()
    gone = torch.zeros(SIZE, dtype=torch.bool)
    gone[[1, 4, 9]] = True
    found = refit_columns(reader, statistics(inputs), gone, 0.0)
    expected = torch.linalg.lstsq(inputs[:, ~gone], inputs @ reader.t()).solution.t()
    torch.testing.assert_close(found[:, ~gone], expected, rtol=1e-3, atol=1e-4)
    assert not found[:, gone].any()


def test_a_refit_of_nothing_is_the_weight_itself():
    reader, _, inputs = numbers()
    none = torch.zeros(SIZE, dtype=torch.bool)
    assert torch.equal(refit_columns(reader, statistics(inputs), none), reader)


def test_a_refit_never_raises_the_error():
    for seed in range(5):
        reader, _, inputs = numbers(seed, tokens=SIZE // 2)  # X·Xᵀ is singular
        gone = torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)) < 0.4
        found = refit_columns(reader, statistics(inputs), gone)
        errors = [((inputs @ (each - reader).t()) ** 2).sum() for each in (found, reader.masked_fill(gone, 0))]
        assert errors[0] <= errors[1]


def test_inputs_that_never_fired_make_up_for_nothing():
    reader, _, inputs = numbers()
    inputs[:, 3] = 0
    gone = torch.zeros(SIZE, dtype=torch.bool)
    gone[[5, 6]] = True
    found = refit_columns(reader, statistics(inputs), gone)
    assert torch.equal(found[:, 3], reader[:, 3]) and found.isfinite().all()
