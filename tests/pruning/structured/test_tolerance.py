"""Tolerance in, share out; and the model is what it was."""

import copy
from dataclasses import replace

import pytest
import torch

from optimum_dsa import find_architecture, perplexity
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig, rise_of
from optimum_dsa.pruning.structured.described import structured_from, structured_to
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


def test_what_is_said_is_met_on_windows_that_calibrate_nothing(demo):  # noqa: F811
    calibration, model = demo[0][:8, :64], demo_llama().train()
    before = state(model)
    found = find_share(model, calibration, DSAStructuredConfig(0.4), "20%", trials=2)
    assert model.training and same_state(model, before) and len(found.tried) == 2
    share, lost = list(found.tried.items())[-1]
    cut = copy.deepcopy(model).eval()
    prune_structures(cut, calibration[:6], DSAStructuredConfig(share))
    assert perplexity(model, calibration[6:]) == pytest.approx(found.dense, rel=1e-3)
    assert perplexity(cut, calibration[6:]) == pytest.approx(lost, rel=1e-3)
    assert f"of at most 20.0% (dense {found.dense:.2f}" in str(found)


@pytest.mark.parametrize("max_loss, share", [(0.0, 0.0), (0.1, 0.1), ("37%", 0.37), (9.0, 0.6)])
def test_the_share_at_which_the_tolerance_ends_is_found(max_loss, share, monkeypatch):
    """Of a model whose perplexity rises by the share of its channels that is gone."""

    def perplexity(model, batches):
        weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
        gone = sum(int((weight == 0).all(0).sum()) * (weight.shape[0] * 3) for weight in weights)
        return 10 * (1 + gone / prunable)

    model = tiny_llama()
    prunable = sum(weight.size for weight in find_architecture(model).weights)
    monkeypatch.setattr("optimum_dsa.pruning.structured.tolerance._perplexity", perplexity)
    config = DSAStructuredConfig(0.6 if max_loss == 9.0 else 0.0, update="none", importance="magnitude")
    found = find_share(model, tokens(), config, max_loss)
    assert found.sparsity == pytest.approx(share, abs=0.02)
    assert all(
        (lost <= found.dense * (1 + found.max_loss)) == (at <= found.sparsity) for at, lost in found.tried.items()
    )


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


def test_five_is_not_taken_for_five_per_cent():
    with pytest.raises(ValueError, match="max_loss='5' is 500%; say '5%', or '500%' if that is meant"):
        DSAStructuredConfig(0.0, max_loss="5")
    assert {DSAStructuredConfig(0.0, max_loss=given).max_loss for given in ("500%", 5, 5.0)} == {"500%"}


def test_a_tolerance_in_the_place_of_a_sparsity_is_that_of_the_share_found():
    by_share, by_loss = tiny_llama(), tiny_llama()
    found = find_share(tiny_llama(), tokens(), DSAStructuredConfig(0.0), "20%")
    expected = prune_structures(by_share, tokens(), DSAStructuredConfig(found.sparsity))
    report = prune_structures(by_loss, tokens(), DSAStructuredConfig(0.0, max_loss=0.2))
    assert same_state(by_loss, state(by_share)) and report.config == expected.config and expected.tolerance == {}
    assert report.tolerance == {
        "max_loss": 0.2,
        "dense": pytest.approx(found.dense),
        "found": pytest.approx(found.tried[found.sparsity]),
        "trials": len(found.tried),
    }
    assert f"{found.sparsity:.4f} found for a perplexity at most 20.0% higher: " in str(report)
    assert structured_from(structured_to(report)).tolerance == report.tolerance


def test_experts_go_by_a_tolerance_as_well():
    model = FAMILIES["Mixtral"][0]()
    before = state(model)
    config = DSAStructuredConfig(0.0, ("expert",), "magnitude")
    found = find_share(model, tokens(8), config, "50%", trials=3)
    assert same_state(model, before) and found.sparsity
    report = prune_structures(model, tokens(8), replace(config, max_loss="50%"))
    assert set(report.kept.values()) <= {2, 3}


def test_a_tolerance_that_nothing_meets_cuts_nothing(monkeypatch):
    rising = iter(range(1, 99))
    monkeypatch.setattr("optimum_dsa.pruning.structured.tolerance._perplexity", lambda *_: next(rising))
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match="No share was found for max_loss='1%': 0.* gave a rise by .*; tolerate more"):
        prune_structures(model, tokens(), DSAStructuredConfig(0.0, max_loss="1%"))
    assert same_state(model, before)


def test_a_rise_is_a_share_or_percent():
    assert (rise_of("5%"), rise_of(0.05), rise_of(" 0.05 "), rise_of(0)) == (0.05, 0.05, 0.05, 0.0)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"sparsity": 0.2, "max_loss": "5%"}, "sparsity=0.2 says how much goes, and max_loss='5%' finds it"),
        ({"sparsity": 0.0, "max_loss": "much"}, "max_loss is a share by which .*, got 'much'"),
        ({"sparsity": 0.0, "max_loss": True}, "max_loss is a name, got True"),
    ],
)
def test_a_tolerance_that_is_none_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        DSAStructuredConfig(**settings)
