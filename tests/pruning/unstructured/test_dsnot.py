"""Laws of dsnot: the mean of every output comes nearer to what it was, and the budget stays."""

import pytest
import torch

from optimum_dsa import DSAConfig, prune, verify
from optimum_dsa.model.architecture import find_architecture
from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.unstructured.dsnot import EXCHANGES, dsnot
from optimum_dsa.pruning.unstructured.metrics import METRICS
from optimum_dsa.pruning.unstructured.updates import UPDATES, Choice

from ...tiny import tiny_llama, tokens
from .test_objective import PATTERNS, removing


def problem(rows=12, columns=32, seed=0, dead=(), dtype=torch.float32):
    """A weight, some of which is zero already, and inputs that have means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=generator) + torch.randn(columns, generator=generator)
    x[:, list(dead)] = 0
    statistics = LayerStatistics(columns, with_sum=True, sequences=4)
    statistics.update_(x)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0, :5] = 0
    return weight.to(dtype), statistics, x


def masked(text, weight, statistics):
    pattern, count = removing(text, weight)
    return Choice(pattern, count, pattern.keep(METRICS["wanda"](weight, statistics), count))


def expected_error(weight, keep, x):
    return weight.double().masked_fill(keep, 0) @ x.double().mean(0)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dead", [(), (0, 3, 4, 17)], ids=["all", "dead"])
def test_the_mean_of_every_output_comes_nearer_and_keeps_its_side(text, dtype, dead):
    weight, statistics, x = problem(dead=dead, dtype=dtype)
    choice = masked(text, weight, statistics)
    new = dsnot(weight, statistics, choice)
    keep = (new != 0) | ((weight == 0) & choice.keep)
    before, after = expected_error(weight, choice.keep, x), expected_error(weight, keep, x)
    assert (after.abs() <= before.abs() + 1e-5).all() and (after * before >= -1e-5).all()
    assert after.abs().sum() < 0.9 * before.abs().sum()
    assert torch.equal(new[keep], weight[keep]) and new.dtype == dtype
    # as many of every row, and of every set, as before
    assert torch.equal(keep.sum(1), choice.keep.sum(1)) and choice.pattern.holds(~keep, choice.count)
    assert not (keep & ~choice.keep & (weight == 0)).any()


def one_after_the_other(weight, statistics, choice):
    """The exchanges of a row, in a loop: the pattern "row"."""
    keep, mean = choice.keep.clone(), statistics.mean
    variance = statistics.squared_sum / statistics.tokens - mean.square()
    for row, kept in zip(weight, keep):
        error = (row * mean)[~kept].sum()
        sign, gains, start = error.sign(), row * mean * error.sign(), kept.clone()
        back = sorted(
            (j for j in range(len(row)) if not start[j] and gains[j] > 0), key=lambda j: -gains[j] / variance[j]
        )
        away = sorted(
            (j for j in range(len(row)) if start[j] and gains[j] < 0),
            key=lambda j: row[j].abs() * statistics.input_norm[j],
        )
        for comes, goes in list(zip(back, away))[:EXCHANGES]:
            error = error - row[comes] * mean[comes] + row[goes] * mean[goes]
            if error.sign() == -sign:
                break
            kept[comes], kept[goes] = True, False
    return weight.masked_fill(~keep, 0)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_exchanged_as_one_after_the_other(seed):
    weight, statistics, _ = problem(columns=200, seed=seed)
    choice = masked("row", weight, statistics)
    new = dsnot(weight, statistics, choice)
    assert torch.equal(new, one_after_the_other(weight, statistics, choice))
    assert ((new != 0) != (weight != 0) & choice.keep).sum() > 20


def test_inputs_that_nobody_saw_or_without_a_mean_move_nothing():
    weight, _, x = problem()
    unseen, silent, even = (LayerStatistics(32, with_sum=True, sequences=1) for _ in range(3))
    silent.update_(torch.zeros(9, 32))
    even.update_(torch.cat([x, -x]))
    even.sum.zero_()
    for statistics in (unseen, silent, even):
        choice = masked("row", weight, statistics)
        assert torch.equal(dsnot(weight, statistics, choice), UPDATES["none"](weight, statistics, choice))


def test_without_the_sums_it_says_which_are_missing():
    weight, _, x = problem()
    statistics = LayerStatistics(32, sequences=1)
    statistics.update_(x)
    with pytest.raises(ValueError, match="mean"):
        dsnot(weight, statistics, masked("row", weight, statistics))


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_the_walk_brings_the_sums_to_whoever_reads_them(pattern):
    model = tiny_llama()
    batches = [{"input_ids": part} for part in tokens(4, 16).split(2)]
    seen = []
    inner = model.model.layers[0].mlp.down_proj
    handle = inner.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    first = next(walk_blocks(model, find_architecture(model), batches, reads={"inputs", "mean"}))
    handle.remove()
    found = first.statistics["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(found.mean, torch.cat(seen[-2:]).mean(0), atol=1e-6, rtol=1e-4)
    other = next(walk_blocks(model, find_architecture(model), batches))
    assert all(each.sum is None for each in other.statistics.values())
    report = prune(model, tokens(), DSAConfig(0.5, "wanda+dsnot", "uniform", pattern=pattern))
    assert report.sparsity == 0.5 and verify(model, report).holds
