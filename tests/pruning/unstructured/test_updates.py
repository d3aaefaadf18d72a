import pytest
import torch

from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.unstructured.metrics import METRICS
from optimum_dsa.pruning.unstructured.patterns import Pattern
from optimum_dsa.pruning.unstructured.updates import UPDATES, Choice


def problem(rows=12, columns=32, seed=0):
    """A weight and inputs that are strongly correlated, so that an update has something to do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    x += 0.3 * torch.randn(400, columns, generator=generator)
    stats = LayerStatistics(columns, with_gram=True, with_sum=True)
    stats.update_(x)
    stats.sequences = 4
    return torch.randn(rows, columns, generator=generator), stats, x


def choose(pattern, weight, stats, count, metric="wanda"):
    return Choice(pattern, count, pattern.keep(METRICS[metric](weight, stats), count))


@pytest.mark.parametrize("update", sorted(UPDATES))
@pytest.mark.parametrize("text", ["row", "matrix", "group:8", "2:4", "mixed:8"])
def test_every_update_removes_what_was_chosen_and_nothing_else(update, text):
    weight, stats, _ = problem()
    before, gram = weight.clone(), stats.gram.clone()
    choice = choose(Pattern.parse(text), weight, stats, weight.numel() // 2)
    new = UPDATES[update](weight, stats, choice)
    if UPDATES.fact(update, "moves"):
        assert int((new != 0).sum()) == int(choice.keep.sum()) and choice.pattern.holds(new == 0, choice.count)
    else:
        assert torch.equal(new != 0, choice.keep)
    assert torch.equal(weight, before) and torch.equal(stats.gram, gram)


def test_no_update_keeps_the_kept_weights_bit_for_bit():
    weight, stats, _ = problem()
    choice = choose(Pattern("row"), weight.bfloat16(), stats, 100)
    assert torch.equal(UPDATES["none"](weight.bfloat16(), stats, choice), weight.bfloat16() * choice.keep)


@pytest.mark.parametrize("text,removed", [("group:8", 150), ("group:128", 151), ("2:4", 192), ("mixed:8", 144)])
def test_sparsegpt_chooses_as_it_goes_exactly(text, removed):
    weight, stats, _ = problem()
    new = UPDATES["sparsegpt"](weight, stats, Choice(Pattern.parse(text), removed))
    assert int((new == 0).sum()) == removed
    if text == "2:4":
        assert ((new == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("text", ["row", "group:8", "2:4"])
def test_sparsegpt_loses_less_of_the_output_than_zeros_alone(text):
    weight, stats, x = problem()
    choice = choose(Pattern.parse(text), weight, stats, weight.numel() // 2)

    def error(new):
        return ((new - weight) @ x.t()).square().sum()

    repaired, zeroed = UPDATES["sparsegpt"](weight, stats, choice), UPDATES["none"](weight, stats, choice)
    assert error(repaired) < 0.7 * error(zeroed)


def test_the_update_is_optimal_for_the_columns_behind_the_removed_one():
    """Removing one column: later weights solve the damped least squares problem, earlier ones stay."""
    weight, stats, _ = problem(rows=3, columns=6)
    keep = torch.ones(3, 6, dtype=torch.bool)
    keep[:, 2] = False
    new = UPDATES["sparsegpt"](weight, stats, Choice(Pattern("matrix"), 3, keep))
    hessian = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(6)
    assert torch.allclose(new[:, :2], weight[:, :2], atol=1e-5)
    later = [3, 4, 5]
    change = weight[:, [2]] @ hessian[[2]][:, later] @ torch.linalg.inv(hessian[later][:, later])
    assert torch.allclose(new[:, 3:], weight[:, 3:] + change, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [100, 130, 300])
def test_the_width_of_the_lazy_updates_does_not_change_the_result(columns):
    weight, stats, _ = problem(columns=columns)
    keep = Pattern("row").keep(METRICS["wanda"](weight, stats), weight.numel() // 2)
    lazy = UPDATES["sparsegpt"](weight, stats, Choice(Pattern("row"), 0, keep))
    eager = UPDATES["sparsegpt"](weight, stats, Choice(Pattern("group", 1), 0, keep))
    assert torch.allclose(lazy, eager, rtol=1e-2, atol=1e-3)


def plain_sparsegpt(weight, factor, text, count):
    """Algorithm 1 column by column, nothing put off, in float64; what goes is chosen where its group begins."""
    new, factor = weight.double().clone(), factor.double()
    rows, columns = new.shape
    pattern = Pattern.parse(text)
    keep = torch.ones_like(new, dtype=torch.bool)
    for j in range(columns):
        if j % pattern.width == 0:
            group = slice(j, min(j + pattern.width, columns))
            scores = (new[:, group] / factor.diagonal()[group]).square()
            if pattern.kind == "group":
                share = sum(count // columns + (i < count % columns) for i in range(columns)[group])
                order = scores.flatten().argsort()[:share]
                keep[:, group] = (
                    torch.ones(scores.numel(), dtype=torch.bool).index_fill_(0, order, False).view_as(scores)
                )
            else:
                share = round(count * pattern.width / columns / rows)
                keep[:, group] = torch.ones_like(scores, dtype=torch.bool).scatter_(
                    1, scores.argsort()[:, :share], False
                )
        error = torch.where(keep[:, j], 0.0, new[:, j] / factor[j, j])
        new[:, j:] -= error[:, None] * factor[j, j:]
    return new.masked_fill(~keep, 0), keep


@pytest.mark.parametrize(
    "text,columns",
    [
        ("3:12", 132), ("6:12", 156), ("mixed:12", 276), ("2:4", 136), ("mixed:8", 264), ("2:4", 260), ("60:150", 300),
        ("group:96", 200), ("group:128", 130), ("group:200", 150), ("group:7", 130),
    ],
)  # fmt: skip
def test_widths_that_128_does_not_divide_are_done_as_column_by_column(text, columns):
    """Groups that would lie across two runs of lazy updates, a last run that is short, groups wider than a run."""
    weight, stats, _ = problem(rows=4, columns=columns)
    pattern = Pattern.parse(text)
    count = round(weight.numel() * (1 - pattern.kept / pattern.width if pattern.kept else 0.5))
    factor = stats.inverse_factor(0.01).factor
    expected, keep = plain_sparsegpt(weight, factor, text, count)
    new = UPDATES["sparsegpt"](weight, stats, Choice(pattern, count))
    assert torch.equal(new != 0, keep)
    assert torch.allclose(new.double(), expected, rtol=1e-2, atol=2e-3)
    assert int((new == 0).sum()) == count


def test_the_damping_of_the_choice_is_the_one_that_is_used():
    weight, stats, _ = problem()
    choice = choose(Pattern("row"), weight, stats, 100)
    little = UPDATES["sparsegpt"](weight, stats, choice)
    assert stats.damping_used == choice.damping == 0.01
    much = UPDATES["sparsegpt"](weight, stats, Choice(choice.pattern, 100, choice.keep, 1e6))
    assert not torch.allclose(little, much, atol=1e-2)
    assert torch.allclose(much, weight * choice.keep, atol=1e-3)  # nothing is correlated any more


def published(weight, gram, count, width, damping=0.01):
    """SparseGPT's algorithm in a few lines: dead columns are set to zero, and so are the first to go."""
    dead, hessian = gram.diagonal() == 0, gram.clone()
    hessian[dead, dead] = 1
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(gram))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    new = weight.masked_fill(dead, 0)
    for start in range(0, weight.shape[1], width):
        columns = range(start, min(start + width, weight.shape[1]))
        scores = (new[:, columns] / upper.diagonal()[columns]) ** 2
        gone = torch.zeros(scores.numel(), dtype=torch.bool)
        gone[scores.flatten().argsort(stable=True)[: count * len(columns) // weight.shape[1]]] = True
        gone = gone.view_as(scores)
        for j in columns:
            error = new[:, j].where(gone[:, j - start], 0) / upper[j, j]
            new[:, j:] -= error[:, None] * upper[j, j:]
            new[gone[:, j - start], j] = 0
    return new


def test_weights_of_inputs_that_never_fired_go_first():
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(12, 16, generator=generator), torch.randn(60, 16, generator=generator)
    dead = [1, 6, 7, 12]
    x[:, dead] = 0
    weight[:, dead] *= 100  # however large they are
    stats = LayerStatistics(16, with_gram=True)
    stats.update_(x)
    new = UPDATES["sparsegpt"](weight, stats, Choice(Pattern.parse("group:8"), 96))
    assert int((new == 0).sum()) == 96 and not new[:, dead].any()
    torch.testing.assert_close(new, published(weight, stats.gram, 96, 8), rtol=1e-4, atol=1e-4)
    by_two = UPDATES["sparsegpt"](weight, stats, Choice(Pattern.parse("2:4"), 96))
    assert not by_two[:, dead].any()  # at most two of four are dead
