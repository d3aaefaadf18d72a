"""What FLAP adds to a bias finds one, also in a model that was made without."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_dsa import DSAPruner, find_architecture, prune_structures
from optimum_dsa.pruning.structured.biases import biases_for, given
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.prune import choose_counts
from optimum_dsa.pruning.structured.structures import find_structures
from optimum_dsa.pruning.structured.tolerance import find_share
from optimum_dsa.pruning.structured.trial import as_pruned, dense_to_try

from ...tiny import same_state, state, tiny_llama, tokens
from .families import FAMILIES, batch_of


def units_of(model, kinds=("ffn",)):
    found = find_structures(model, find_architecture(model), batch_of("Llama")).structures
    return {unit: each for unit, each in found.items() if each.kind in kinds}


def test_a_switch_gives_what_comes_with_it_and_nothing_else():
    model = tiny_llama()
    found = biases_for(model, units_of(model))
    assert found.switches == ("mlp_bias",)
    assert {name.split(".", 3)[3] for name in found.sizes} == {
        f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")
    }
    both = biases_for(model, units_of(model, ("ffn", "kv_group")))
    assert set(both.switches) == {"mlp_bias", "attention_bias"}
    has = FAMILIES["Llama with biases"][0]()
    assert not biases_for(has, units_of(has)).switches


@torch.no_grad()
def test_zeros_compute_what_there_was_and_are_taken_back_on_an_error():
    model = tiny_llama()
    before, whole = state(model), model(tokens()).logits
    with pytest.raises(KeyError), given(model, biases_for(model, units_of(model))):
        assert torch.equal(model(tokens()).logits, whole) and model.config.mlp_bias
        raise KeyError
    assert same_state(model, before) and not model.config.mlp_bias


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_a_bias_makes_up_for_what_is_constant(layout, tmp_path):
    """An input that does not vary is worth its mean: with it in a bias, nothing is lost."""
    model = tiny_llama()
    for layer in model.model.layers:
        # gate and up of nothing: every channel gives 0, but for the first, which a bias in `down` can stand in for
        layer.mlp.gate_proj.weight.data.zero_()
    config = DSAStructuredConfig(0.2, importance="flap", update="bias", layout=layout)
    with torch.no_grad():
        whole = model(tokens()).logits
    prune_structures(model, tokens(), config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, whole)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits
    assert torch.equal(again, model(tokens()).logits) and model.config.mlp_bias


@torch.no_grad()
def test_it_is_the_mean_of_what_goes_that_is_added():
    dense, model = tiny_llama(), tiny_llama()
    config = DSAStructuredConfig(0.2, importance="flap", update="bias", layout="per_layer")
    report = prune_structures(model, tokens(), config)
    inputs = []
    reader = dense.model.layers[0].mlp.down_proj
    reader.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    dense(tokens())
    gone = list(report.gone["model.layers.0:ffn"])
    expected = reader.weight[:, gone] @ inputs[0].flatten(0, 1).mean(0)[gone]
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.bias, expected, rtol=1e-4, atol=1e-6)


def test_a_class_without_a_switch_is_refused_and_stays_as_it_was():
    model = FAMILIES["Mistral"][0]()
    before = state(model)
    with pytest.raises(ValueError, match="down_proj has none .* MistralConfig no switch for one; use update='refit'"):
        prune_structures(model, tokens(), DSAStructuredConfig(0.2, importance="flap", update="bias"))
    assert same_state(model, before)


@pytest.mark.parametrize("kind, layout", [("ffn", "uniform"), ("kv_group", "per_layer")])
def test_a_trial_lends_what_a_prune_gives(kind, layout):
    """And counts it: three key-value groups are a fifth of the parameters without biases, and more with them."""
    model, cut = tiny_llama(), tiny_llama()
    before, settings = state(model), model.config.to_dict()
    config = DSAStructuredConfig(0.2, (kind,), "wanda_sp", "bias", layout=layout)
    report = prune_structures(cut, tokens(), config)
    dense = dense_to_try(model, tokens(), config)
    with as_pruned(dense, choose_counts(dense)[0]) as gone, torch.no_grad():
        assert {unit: tuple(gone.get(unit, ())) for unit in report.gone} == report.gone
        torch.testing.assert_close(model(tokens(2)).logits, cut(tokens(2)).logits, rtol=1e-4, atol=1e-5)
    assert kind == "ffn" or sum(map(len, report.gone.values())) == 2
    assert same_state(model, before) and model.config.to_dict() == settings


def test_a_tolerance_finds_the_share_of_a_cut_that_gives_biases():
    model, cut = tiny_llama(), tiny_llama()
    before, config = state(model), DSAStructuredConfig(0.0, importance="flap", update="bias")
    found = find_share(model, tokens(), config, "50%")
    assert found.sparsity and same_state(model, before) and not model.config.mlp_bias
    prune_structures(model, tokens(), replace(config, max_loss="50%"))
    prune_structures(cut, tokens(), replace(config, sparsity=found.sparsity))
    assert same_state(model, state(cut)) and model.config.mlp_bias


def test_a_search_of_a_cut_that_gives_biases_is_pruned_to_what_it_found():
    model = tiny_llama()
    before, config = state(model), DSAStructuredConfig(0.2, importance="flap", update="bias", layout="per_layer")
    pruner, seen = DSAPruner(model), tokens(4, seed=1)
    result = pruner.search(tokens(), config, "evolution", "3k tokens", seen)
    assert same_state(model, before) and not model.config.mlp_bias
    report = pruner.prune(tokens(), replace(config, allocation=result.best))
    assert report.allocation.counts() == result.best.counts()


def test_a_trial_of_a_class_without_a_switch_is_refused_before_work(monkeypatch):
    model = FAMILIES["Mistral"][0]()
    before, config = state(model), DSAStructuredConfig(0.2, importance="flap", update="bias", layout="per_layer")
    refused = "down_proj has none .* MistralConfig no switch for one; use update='refit'"
    monkeypatch.setattr("optimum_dsa.search.evaluator.Evaluator.__init__", None)
    with pytest.raises(ValueError, match=refused):
        prune_structures(model, tokens(), replace(config, sparsity=0.0, max_loss="50%"))
    with pytest.raises(ValueError, match=refused):
        DSAPruner(model).search(tokens(), config, "evolution", "3k tokens", tokens(4, seed=1))
    assert same_state(model, before)
