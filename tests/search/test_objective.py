"""What a loss is taken from: calibration tokens, windows, and the tail of the vocabulary."""

import pytest
import torch

from optimum_dsa import Calibration, DSAConfig, perplexity
from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.unstructured.metrics import METRICS
from optimum_dsa.pruning.unstructured.patterns import Pattern, removal_order
from optimum_dsa.search.masking import quantise
from optimum_dsa.search.objective import ANCHOR_TOKENS, Objective, _change, _first, _parts, _rest

from ..tiny import same_state, state, tiny_llama, tokens


VALIDATION = tokens(5, 16, seed=5)


def objective(calibration, method="wanda", **changes):
    model = tiny_llama(num_hidden_layers=2)
    return Objective(
        model, Calibration({"input_ids": calibration}, "x"), VALIDATION, DSAConfig(0.6, method, **changes)
    )


def orders(found, counts=None, sequential=False):
    if sequential:
        found.sequential(counts, range(1))
    else:
        found.move_anchor(counts)
        found.loss(counts or {}, range(1))
    return found.masked.orders


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_scores_at_an_anchor_are_taken_from_8192_tokens_and_those_of_an_update_and_of_finalists_from_all():
    """128 windows of 64 tokens; behind them come others, of a single token."""
    assert ANCHOR_TOKENS == 8192
    many = torch.cat([tokens(128, 64), torch.full((32, 64), 3)])
    exact, more, less = (objective(many[:number]) for number in (128, 160, 120))
    assert same(orders(exact), orders(more)) and not same(orders(exact), orders(less))
    counts = {name: size // 2 for name, size in exact.sizes.items()}
    assert same(orders(exact, counts), orders(more, counts))
    assert not same(orders(exact, counts, sequential=True), orders(more, counts, sequential=True))
    exact, more = (objective(many[:number], "sparsegpt") for number in (128, 160))
    assert not same(orders(exact, counts), orders(more, counts))


@pytest.mark.parametrize("wanted,taken", [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (1000, 3)])
def test_as_many_batches_as_hold_the_tokens(wanted, taken):
    batches = [{"input_ids": torch.zeros(2, 4), "mask": torch.zeros(2, 9)} for _ in range(3)]
    assert _first(batches, wanted) == batches[:taken]


def test_windows_are_taken_in_batches_of_one_size():
    assert _parts(range(2, 9), 3) == [range(2, 5), range(5, 8), range(8, 9)]
    assert _parts(range(0, 4), 4) == [range(0, 4)] and _parts(range(3, 3), 4) == []


def test_what_is_not_among_the_likeliest_counts_as_one_outcome():
    values = torch.tensor([[0.5, 0.3], [0.6, 0.4]]).log()
    assert _rest(values)[0].item() == pytest.approx(torch.tensor(0.2).log().item(), rel=1e-5)
    assert _rest(values)[1].item() == pytest.approx(-16.0, abs=4.5) and _rest(values).isfinite().all()


def test_a_divergence_over_few_outcomes_is_that_of_the_grouped_distributions():
    found = objective(tokens())
    found = Objective(found.model, found.calibration, VALIDATION, found.config, top=7)
    logits = torch.randn(5, 16, 97, generator=torch.Generator().manual_seed(0))
    loss = found._compare(logits, range(5))
    with torch.no_grad():
        dense = found.model(VALIDATION).logits.softmax(-1)
    top = dense.topk(7, dim=-1).indices
    groups = [
        torch.cat([p.gather(-1, top), 1 - p.gather(-1, top).sum(-1, keepdim=True)], -1)
        for p in (dense, logits.softmax(-1))
    ]
    expected = (groups[0] * (groups[0] / groups[1]).log()).sum(-1)
    assert torch.allclose(loss, expected, rtol=5e-3, atol=5e-3)
    assert (loss > 0).all()


def test_the_perplexity_of_a_finalist_is_that_of_the_pruned_model():
    found = objective(tokens(), "magnitude")
    before = state(found.model)
    counts = {name: size // 2 for name, size in found.sizes.items()}
    _, measured = found.sequential(counts, range(1, 4))
    assert same_state(found.model, before)
    for weight in found.architecture.weights:
        tensor = weight.tensor(found.model)
        tensor.data.mul_(found.pattern.keep(tensor.abs(), counts[weight.name]))
    assert measured == pytest.approx(perplexity(found.model, VALIDATION[1:4]), rel=1e-4)


@pytest.mark.parametrize("pattern,share", [("row", 0.1), ("mixed:4", 0.1), ("mixed:4", 0.25), ("row", 0.0)])
def test_a_change_is_from_a_little_fewer_to_a_little_more_removed(pattern, share):
    generator = torch.Generator().manual_seed(0)
    weight, stats = torch.randn(6, 8, generator=generator), LayerStatistics(8, with_gram=True)
    stats.update_(torch.randn(50, 8, generator=generator))
    config = DSAConfig(0.5, "sparsegpt", pattern=pattern)
    change, number = _change(weight, stats, config.resolved, 24, share)
    width = max(int(share * 48), 12 if pattern == "mixed:4" else 1)
    assert number == 2 * width
    both = [config.resolved.pruned(weight, stats, count) for count in (24 - width, 24 + width)]
    assert torch.allclose(change.float(), both[1] - both[0], rtol=1e-2, atol=1e-2) and change.dtype == torch.bfloat16
    assert (
        _change(weight, stats, config.resolved, 0, share)[1]
        == _change(weight, stats, config.resolved, 48, share)[1]
        == width
    )


def test_what_an_update_removes_goes_first_and_what_it_keeps_takes_its_value():
    found = objective(tokens(), "sparsegpt")
    counts = {name: size // 2 for name, size in found.sizes.items()}
    orders(found, counts)
    for name, values in found.masked.values.items():
        keep = found.masked.keep(name, counts[name])
        weight = found.masked.weights[name].tensor(found.model)
        assert torch.equal(values[~keep], weight[~keep])  # no update there: it is masked
        assert not torch.equal(values[keep], weight[keep])


def test_without_an_anchor_the_order_is_that_of_the_dense_scores():
    found = objective(tokens(), "magnitude")
    for weight in found.architecture.weights:
        scores = METRICS["magnitude"](weight.tensor(found.model))
        expected = quantise(removal_order(Pattern("matrix"), scores))
        assert torch.equal(orders(found)[weight.name], expected)


def test_slopes_ask_for_no_gradient_of_what_is_not_pruned_and_leave_flags_alone():
    found = objective(tokens(), "wanda")
    found.model.lm_head.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in found.model.parameters()]
    counts = {name: size // 2 for name, size in found.sizes.items()}
    loss, slopes = found.slopes(counts, range(1, 4))
    assert [parameter.requires_grad for parameter in found.model.parameters()] == flags
    assert loss == pytest.approx(found.loss(counts, range(1, 4)), rel=1e-4)
    assert slopes.keys() == found.sizes.keys() and any(slopes.values())
    parts = [found.slopes(counts, range(start, start + 1))[1] for start in (1, 2, 3)]
    name = next(iter(slopes))
    assert slopes[name] == pytest.approx(sum(part[name] for part in parts) / 3, rel=1e-3)


@pytest.mark.parametrize("vocabulary", [2**15, 2**15 + 500])
def test_tokens_of_large_vocabularies_are_told_apart(vocabulary):
    model = tiny_llama(num_hidden_layers=1, vocab_size=vocabulary, hidden_size=16, intermediate_size=16)
    model.lm_head.weight.data[-1] *= 50  # so that the last token is among the likeliest somewhere
    found = Objective(model, Calibration({"input_ids": tokens()}, "x"), tokens(2, 8), DSAConfig(0.5), top=4)
    assert found.loss(dict.fromkeys(found.sizes, 0), range(2)) == pytest.approx(0, abs=2e-3)
    assert max(int(ids.max()) for _, ids in found._dense) == vocabulary - 1
    assert min(int(ids.min()) for _, ids in found._dense) >= 0
    assert {ids.element_size() for _, ids in found._dense} == {2 if vocabulary == 2**15 else 4}
