"""One tensor holds z and u, the projection is the best one of its pattern, and ADMM ends where x = z."""

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.pruning.unstructured.patterns import Pattern
from optimum_dsa.recovery.elsa.split import SplitWeights

from ...tiny import tiny_llama


def split_of(model, sparsity=0.5, pattern="matrix"):
    weights = {weight: round(sparsity * weight.size) for weight in find_architecture(model).weights}
    split = SplitWeights(model, weights, Pattern.parse(pattern))
    split.begin()
    return split


def moments_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {parameter: torch.rand(parameter.shape, generator=generator) for parameter in model.parameters()}


def test_mask_and_dual_are_those_of_the_formulas():
    """Three projections and pulls by hand."""
    model = tiny_llama()
    split, moments = split_of(model), moments_of(model)
    weight = next(iter(split.weights))
    x, v = weight.tensor(model), moments[weight.parameter(model)]
    u = split.splits[weight.name].dual.clone()
    for seed in range(3):
        x += 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        split.project(moments)
        total = x + u
        keep = Pattern("matrix").keep(v * total.square(), split.weights[weight])
        u = total - torch.where(keep, total, torch.zeros(()))
        found = split.splits[weight.name]
        torch.testing.assert_close(found.dual, u)
        assert torch.equal(found.keep, keep) and int((found.dual != 0).sum()) == split.weights[weight]
        expected = torch.where(keep, x, x - 0.3 * (x + u))
        split.pull(0.3)
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("pattern", ["matrix", "row", "group:8", "2:4", "mixed:8"])
@pytest.mark.parametrize("weighted", [True, False])
def test_no_other_mask_of_the_pattern_keeps_more(pattern, weighted):
    """Swapping any kept entry for a removed one of the same set would lower what is kept."""
    model = tiny_llama()
    split, moments = split_of(model, 0.5, pattern), moments_of(model) if weighted else {}
    split.project(moments)
    for weight, count in split.weights.items():
        found, total = split.splits[weight.name], weight.tensor(model)
        v = moments.get(weight.parameter(model), torch.ones_like(total))
        scores = v * total.square()
        assert int((~found.keep).sum()) == count and torch.equal(
            found.keep, Pattern.parse(pattern).keep(scores, count)
        )
        sets = {"row": weight.shape[1], "2:4": 4, "mixed:8": 8}.get(pattern, weight.size)
        if pattern == "group:8":
            scores, keep = scores.t().reshape(-1, 8 * weight.shape[0]), found.keep.t().reshape(-1, 8 * weight.shape[0])
        else:
            scores, keep = scores.reshape(-1, sets), found.keep.reshape(-1, sets)
        least_kept = scores.masked_fill(~keep, torch.inf).amin(1)
        most_removed = scores.masked_fill(keep, -torch.inf).amax(1)
        assert (least_kept >= most_removed).all()


def test_what_was_stored_goes_on_in_another_model():
    split = split_of(tiny_llama())
    split.project(moments_of(split.model))
    again = split_of(tiny_llama())
    again.restore(split.stored())
    assert all(torch.equal(again.splits[name].dual, found.dual) for name, found in split.splits.items())
    with pytest.raises(ValueError, match=r"nothing of the shape of .*q_proj"):
        again.restore({})


def test_without_a_loss_the_weights_go_to_the_sparse_ones_and_the_duals_vanish():
    """f = 0: the nearest point of the budget is the largest entries as they are."""
    model = tiny_llama()
    split = split_of(model)
    split.project({})
    expected = {weight.name: weight.tensor(model) * split.splits[weight.name].keep for weight in split.weights}
    apart = [split.residual()]
    for _ in range(12):
        for _ in range(4):
            split.pull(0.3)
        split.project({})
        apart.append(split.residual())
    assert apart[-1] < 0.05 * apart[0] > 0
    split.make_sparse()
    assert split.residual() == 0
    for weight in split.weights:
        torch.testing.assert_close(weight.tensor(model), expected[weight.name])


def test_kept_weights_that_are_zero_by_chance_do_not_add_to_the_zeros():
    model = tiny_llama()
    for weight in find_architecture(model).weights:
        weight.tensor(model)[:, ::2] = 0
    split = split_of(model, 0.25)
    split.project({})
    split.make_sparse()
    assert all(int((weight.tensor(model) == 0).sum()) == count for weight, count in split.weights.items())


@pytest.mark.parametrize("pattern", ["matrix", "2:4"])
def test_a_budget_that_grows_takes_what_it_says_and_ends_as_the_pattern(pattern):
    model = tiny_llama()
    split, before = split_of(model, 0.5, pattern), 0
    assert all(found.keep.all() for found in split.splits.values())
    for share in (0.0, 0.5, 0.75, 1.0):
        split.project({}, share)
        removed = sum(int((~found.keep).sum()) for found in split.splits.values())
        assert before <= removed
        before = removed
    for weight, count in split.weights.items():
        removed = ~split.splits[weight.name].keep
        assert int(removed.sum()) == count and Pattern.parse(pattern).holds(removed, count)
