"""Tolerance in, share out; and the model is what it was."""

import copy

import pytest
import torch

from optimum_dsa import perplexity
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.prune import choose_counts, dense_of, prune_structures
from optimum_dsa.pruning.structured.tolerance import find_share
from optimum_dsa.pruning.structured.trial import as_pruned

from ...tiny import same_state, state, tiny_llama, tokens
from .families import FAMILIES
from .test_prune import demo, demo_llama  # noqa: F401 - a fixture


@pytest.mark.parametrize("family", ["Llama with biases", "GPT2"])
@pytest.mark.parametrize("update", ["none", "bias", "refit"])
def test_the_model_is_as_pruned_and_then_as_before(family, update):
    model, cut = (FAMILIES[family][0]() for _ in range(2))
    before = state(model)
    config = DSAStructuredConfig(0.3, update=update, importance="wanda_sp", layout="per_layer", allocation="atp")
    dense = dense_of(model, tokens(), config)
    report = prune_structures(cut, tokens(), config)
    with as_pruned(dense, choose_counts(dense)[0]) as gone, torch.no_grad():
        assert {unit: tuple(numbers.tolist()) for unit, numbers in gone.items()} == report.gone
        torch.testing.assert_close(model(tokens(2)).logits, cut(tokens(2)).logits, rtol=1e-4, atol=1e-5)
    assert same_state(model, before)


def test_more_tolerance_takes_more_and_what_is_said_is_met(demo):  # noqa: F811
    calibration, _ = demo
    model = demo_llama().train()
    before = state(model)
    found = {loss: find_share(model, calibration, DSAStructuredConfig(0.0), loss, trials=4) for loss in (0.02, "20%")}
    assert model.training and same_state(model, before)
    less, more = found.values()
    assert 0 < less.sparsity < more.sparsity
    for each, loss in zip((less, more), (0.02, 0.2)):
        assert each.tried[each.sparsity] <= each.dense * (1 + loss)
        assert min(rest for share, rest in each.tried.items() if share > each.sparsity) > each.dense * (1 + loss)
    kept, last = calibration[:12], calibration[12:]
    cut = copy.deepcopy(model).eval()
    prune_structures(cut, kept, DSAStructuredConfig(more.sparsity))
    assert perplexity(cut, last) == pytest.approx(more.tried[more.sparsity], rel=1e-3)
    assert f"of at most 20.0% (dense {more.dense:.2f}" in str(more)


def test_what_is_given_is_tried_first():
    found = find_share(tiny_llama(), tokens(), DSAStructuredConfig(0.3), 100.0)
    assert found.sparsity == 0.3 and list(found.tried) == [0.3]


def test_no_tolerance_takes_nothing():
    model = tiny_llama()
    found = find_share(model, tokens(), DSAStructuredConfig(0.0), 0.0, trials=2)
    assert found.sparsity == 0.0 or found.tried[found.sparsity] <= found.dense


@pytest.mark.parametrize(
    "model, samples, loss, said",
    [
        ("Llama", 4, "much", "max_loss is a share by which the perplexity may rise, such as 0.05 or '5%', got 'much'"),
        ("Llama", 4, -0.1, "got -0.1"),
        ("Llama", 1, 0.1, "give two windows of text or tokens at least"),
        ("Bert", 4, 0.1, "BertForMaskedLM .*, and a perplexity is of next tokens"),
    ],
)
def test_what_cannot_be_asked_is_refused(model, samples, loss, said):
    with pytest.raises(ValueError, match=said):
        find_share(FAMILIES[model][0](), tokens(samples), DSAStructuredConfig(0.0), loss)
