"""Masks as the realisation of an allocation: what prune removes, anchors, slopes."""

from dataclasses import replace

import pytest
import torch

from optimum_dsa import Allocation, Calibration, DSAConfig, UpdateConfig, allocate, prune
from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.allocation import split_count
from optimum_dsa.pruning.unstructured.metrics import METRICS
from optimum_dsa.pruning.unstructured.patterns import Pattern, removal_order
from optimum_dsa.search.realise import check_searchable, realise
from optimum_dsa.search.realise.masked_model import quantise
from optimum_dsa.search.realise.masks import ANCHOR_TOKENS, _change, _step, first_of
from optimum_dsa.search.resolver import Resolver
from optimum_dsa.search.space import Candidate

from ...tiny import same_state, state, tiny_llama, tokens
from ..toy import counts_of, judge


VALIDATION = tokens(5, 16, seed=5)
CALIBRATION = Calibration({"input_ids": tokens()}, "x")


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt", "alps", "wanda+swap", "wanda+dsnot"])
def test_the_sequential_loss_is_that_of_the_model_that_prune_leaves(method):
    model = tiny_llama()
    before = state(model)
    config = DSAConfig(0.6, method, "atp", spread=0.1)
    calibration, validation = Calibration({"input_ids": tokens()}, "x"), tokens(4, 16, seed=5)
    objective = judge(model, calibration, validation, config)
    counts = {}
    report_model = tiny_llama()
    report = prune(report_model, calibration, config)
    for block, count in report.allocation.counts().items():
        weights = objective.realisation.architecture.units("block")[block]
        counts |= split_count(count, {weight.name: weight.size for weight in weights})
    found, _ = objective.sequential(counts, range(4))
    assert same_state(model, before)
    model.load_state_dict(report_model.state_dict())
    objective.realisation.masked.counts = {}
    with torch.no_grad():
        assert found == pytest.approx(objective._divergence(range(4)).mean().item(), rel=1e-4)


def test_slopes_are_the_change_of_the_loss_along_the_masks(objective):
    """Against the loss itself, one matrix at a time moved by a few per cent."""
    counts = counts_of(objective, 0.6)
    before = state(objective.model)
    loss, slopes = objective.slopes(counts, range(4))
    assert loss == pytest.approx(objective.loss(counts, range(4)), rel=1e-4)
    measured, predicted = [], []
    for name, size in objective.realisation.sizes.items():
        more, less = dict(counts), dict(counts)
        more[name] += round(0.02 * size)
        less[name] -= round(0.02 * size)
        change = objective.loss(more, range(4)) - objective.loss(less, range(4))
        measured.append(change / (more[name] - less[name]))
        predicted.append(slopes[name])
    correlation = torch.corrcoef(torch.tensor([measured, predicted]))[0, 1]
    assert correlation > 0.8
    assert same_state(objective.model, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in objective.model.parameters())


def test_slopes_follow_what_an_update_makes_of_the_kept_weights():
    """Against the sequential prune itself, one matrix of the last block at a time, where the loss is nearly linear."""
    calibration, validation = Calibration({"input_ids": tokens()}, "x"), tokens(16, 16, seed=5)
    objective = judge(tiny_llama(), calibration, validation, DSAConfig(0.6, "sparsegpt"))
    counts = counts_of(objective, 0.6)
    objective.move_anchor(counts)
    loss, slopes = objective.slopes(counts, range(16))
    assert loss == pytest.approx(objective.loss(counts, range(16)), rel=1e-4)
    last = list(objective.realisation.architecture.units("block").values())[-1]
    for weight in (weight for weight in last if "mlp" in weight.name):
        width = int(0.05 * weight.size)
        fewer, more = (
            objective.sequential(counts | {weight.name: counts[weight.name] + way}, range(16))[0]
            for way in (-width, width)
        )
        assert slopes[weight.name] == pytest.approx((more - fewer) / (2 * width), rel=0.25)
    objective.move_anchor(counts)
    objective.loss(counts, range(16))  # which needs no changes
    assert objective.slopes(counts, range(16))[1] == slopes


def built(calibration, method="wanda", **changes):
    config = DSAConfig(0.6, method, **changes)
    return judge(tiny_llama(num_hidden_layers=2), Calibration({"input_ids": calibration}, "x"), VALIDATION, config)


def orders(found, counts=None):
    found.move_anchor(counts)
    found.loss(counts or {}, range(1))
    return found.realisation.masked.orders


def exact_masks(found, counts):
    with found.realisation.pruned(counts):
        return dict(found.realisation.masked.exact)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_scores_at_an_anchor_are_taken_from_8192_tokens_and_those_of_an_update_and_of_finalists_from_all():
    """128 windows of 64 tokens; behind them come others, of a single token."""
    assert ANCHOR_TOKENS == 8192
    many = torch.cat([tokens(128, 64), torch.full((32, 64), 3)])
    exact, more, less = (built(many[:number]) for number in (128, 160, 120))
    assert same(orders(exact), orders(more)) and not same(orders(exact), orders(less))
    counts = {name: size // 2 for name, size in exact.realisation.sizes.items()}
    assert same(orders(exact, counts), orders(more, counts))
    assert not same(exact_masks(exact, counts), exact_masks(more, counts))
    exact, more = (built(many[:number], "sparsegpt") for number in (128, 160))
    assert not same(orders(exact, counts), orders(more, counts))


@pytest.mark.parametrize("wanted,taken", [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (1000, 3)])
def test_as_many_batches_as_hold_the_tokens(wanted, taken):
    batches = [{"input_ids": torch.zeros(2, 4), "mask": torch.zeros(2, 9)} for _ in range(3)]
    assert first_of(batches, wanted) == batches[:taken]


@pytest.mark.parametrize("pattern,share", [("row", 0.1), ("mixed:4", 0.1), ("mixed:4", 0.25), ("row", 0.0)])
def test_a_change_is_from_a_little_fewer_to_a_little_more_removed(pattern, share):
    generator = torch.Generator().manual_seed(0)
    weight, stats = torch.randn(6, 8, generator=generator), LayerStatistics(8, with_gram=True)
    stats.update_(torch.randn(50, 8, generator=generator))
    method = DSAConfig(0.5, "sparsegpt", pattern=pattern).resolved
    step = _step(Pattern.parse(pattern), 48)
    assert step == (12 if pattern == "mixed:4" else 1)
    width = max(int(share * 48), step)
    change, number = _change(weight, stats, method, 24, width)
    assert number == 2 * width
    both = [method.pruned(weight, stats, count) for count in (24 - width, 24 + width)]
    assert torch.allclose(change.float(), both[1] - both[0], rtol=1e-2, atol=1e-2) and change.dtype == torch.bfloat16
    assert _change(weight, stats, method, 0, width)[1] == _change(weight, stats, method, 48, width)[1] == width


def test_what_an_update_removes_goes_first_and_what_it_keeps_takes_its_value():
    found = built(tokens(), "sparsegpt")
    counts = {name: size // 2 for name, size in found.realisation.sizes.items()}
    orders(found, counts)
    for name, values in found.realisation.masked.values.items():
        keep = found.realisation.masked.keep(name, counts[name])
        weight = found.realisation.masked.weights[name].tensor(found.model)
        assert torch.equal(values[~keep], weight[~keep])  # no update there: it is masked
        assert not torch.equal(values[keep], weight[keep])


def test_without_an_anchor_the_order_is_that_of_the_dense_scores():
    found = built(tokens(), "magnitude")
    for weight in found.realisation.architecture.weights:
        scores = METRICS["magnitude"](weight.tensor(found.model))
        expected = quantise(removal_order(Pattern("matrix"), scores))
        assert torch.equal(orders(found)[weight.name], expected)


def test_slopes_ask_for_no_gradient_of_what_is_not_pruned_and_leave_flags_alone():
    found = built(tokens(), "wanda")
    found.model.lm_head.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in found.model.parameters()]
    counts = {name: size // 2 for name, size in found.realisation.sizes.items()}
    loss, slopes = found.slopes(counts, range(1, 4))
    assert [parameter.requires_grad for parameter in found.model.parameters()] == flags
    assert loss == pytest.approx(found.loss(counts, range(1, 4)), rel=1e-4)
    assert slopes.keys() == found.realisation.sizes.keys() and any(slopes.values())
    parts = [found.slopes(counts, range(start, start + 1))[1] for start in (1, 2, 3)]
    name = next(iter(slopes))
    assert slopes[name] == pytest.approx(sum(part[name] for part in parts) / 3, rel=1e-3)


# -- what prune makes of it


def removed(model, config):
    """Matrix -> keep mask of a fresh copy of the model, pruned; and the report."""
    report = prune(model, CALIBRATION, config)
    return {weight.name: weight.tensor(model) != 0 for weight in report_architecture(model)}, report


def report_architecture(model):
    return realise(model, CALIBRATION, DSAConfig(0.5)).architecture.weights


@pytest.mark.parametrize("pattern", ["mixed:4", "mixed:8", "row"])
@pytest.mark.parametrize("allocation", ["owl", "atp", "er", "uniform"])
def test_what_is_rounded_is_what_prune_removes(pattern, allocation):
    config = DSAConfig(0.55, pattern=pattern, allocation=allocation)
    model = tiny_llama(num_hidden_layers=4)
    resolver = Resolver(model, realise(model, CALIBRATION, config), CALIBRATION, config, (allocation,))
    found = dict(zip(resolver.sizes, resolver.removed(Candidate(allocation))))
    masks, report = removed(model, config)
    assert found == {name: int((~keep).sum()) for name, keep in masks.items()}
    asked = resolver.allocation(resolver.counts(Candidate(allocation)), allocation)
    given = allocate(tiny_llama(num_hidden_layers=4), CALIBRATION, replace(config, allocation=asked))
    assert given.counts() == report.allocation.counts()  # and so it is where what was asked for is handed over


TRUE_SEQUENTIAL = {"update": UpdateConfig(true_sequential=True)}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("changes", [{"pattern": "mixed:4"}, {"sequential": False}, {}, TRUE_SEQUENTIAL])
def test_a_finalist_is_masked_weight_by_weight_as_prune_masks_it(method, changes):
    """In matrices of more weights than an order has steps, too."""
    large = {"num_hidden_layers": 2, "hidden_size": 264, "intermediate_size": 264}
    config = DSAConfig(0.6, method, "atp", spread=0.1, **changes)
    model = tiny_llama(**large)
    resolver = Resolver(model, found := realise(model, CALIBRATION, config), CALIBRATION, config, ("atp",))
    assert max(found.sizes.values()) > 2**16
    counts = dict(zip(found.sizes, resolver.removed(Candidate("atp", 0.1))))
    with found.pruned(counts):
        masks = dict(found.masked.exact)
    expected, _ = removed(model, config)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert not found.masked.exact and not found.masked.values


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_finalist_with_dense_targets_is_what_prune_makes_of_it(true_sequential):
    update = UpdateConfig(targets="dense", true_sequential=true_sequential, residual=True)
    config = DSAConfig(0.6, "sparsegpt", "atp", spread=0.1, update=update)
    model, other = tiny_llama(), tiny_llama()
    resolver = Resolver(model, found := realise(model, CALIBRATION, config), CALIBRATION, config, ("atp",))
    counts = dict(zip(found.sizes, resolver.removed(Candidate("atp", 0.1))))
    prune(other, CALIBRATION, config)
    with found.pruned(counts), torch.no_grad():
        text = CALIBRATION.inputs["input_ids"]
        torch.testing.assert_close(model(text).logits, other(text).logits)
    found.move_anchor(counts)
    with found.slopes(counts) as slopes:
        model(text, labels=text).loss.backward()
    assert all(value == value for value in slopes.values()) and any(slopes.values())


def test_a_pattern_that_leaves_nothing_to_allocate_is_refused_with_the_one_that_does():
    config = DSAConfig(0.5, pattern="2:4", allocation="uniform")
    with pytest.raises(ValueError, match="no allocation to search for; use pattern='mixed:4'"):
        check_searchable(config)
    with pytest.raises(ValueError, match="mixed:4"):
        realise(tiny_llama(), CALIBRATION, config)
    check_searchable(DSAConfig(0.5, pattern="mixed:4"))


def test_a_matrix_changes_by_whole_n_where_the_pattern_needs_them():
    model = tiny_llama()
    free, whole = (realise(model, CALIBRATION, DSAConfig(0.5, pattern=pattern)) for pattern in ("row", "mixed:8"))
    assert set(free.steps.values()) == {1}
    assert whole.steps == {name: size // 8 for name, size in whole.sizes.items()}
    odd = Allocation({name: (size // 2 + 3) / size for name, size in free.sizes.items()}, free.sizes)
    assert free.fitted(odd) == odd
    assert all(count % whole.steps[name] == 0 for name, count in whole.fitted(odd).counts().items())


def test_a_granularity_would_be_passed_over_and_is_refused():
    with pytest.raises(ValueError, match="granularity='matrix' is of an allocation that is computed"):
        realise(tiny_llama(), None, DSAConfig(0.5, granularity="matrix"))
