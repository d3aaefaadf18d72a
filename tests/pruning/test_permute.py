"""Channels in another order before N:M pruning: the same model, more of the score, and an ordinary checkpoint."""

import logging

import pytest
import torch

from optimum_dsa import PERMUTATIONS, DSAConfig, DSAPruner, UpdateConfig, find_architecture, prune, verify
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.model import coupling
from optimum_dsa.model.statistics import CollectedStatistics
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning import permute
from optimum_dsa.pruning.allocate import allocate
from optimum_dsa.pruning.permute import Permute
from optimum_dsa.pruning.prune import run_steps
from optimum_dsa.pruning.sink import KeepBlocks
from optimum_dsa.pruning.source import as_calibration
from optimum_dsa.pruning.unstructured import permutations

from ..tiny import same_state, state, tiny_llama, tokens


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    """So many that `learned` finds something."""
    monkeypatch.setattr(permutations, "STEPS", 6)


def config(permutation="ria", pattern="2:4", method="wanda", **changes):
    kept, width = map(int, pattern.split(":"))
    return DSAConfig(1 - kept / width, method, "uniform", pattern=pattern, permute=permutation, **changes)


def only_permuted(model, asked):
    """The step that has put channels in order, and nothing else was done."""
    architecture = find_architecture(model)
    step = Permute(asked.resolved, allocate(model, None, asked, architecture), asked.permute)
    run_steps(model, architecture, as_calibration(tokens(), model), asked, [step], KeepBlocks())
    return step


def backwards(self, walked, coupling, scores, columns, kept):
    return torch.arange(columns.shape[1]).flip(0)


@pytest.mark.parametrize("name", sorted(PERMUTATIONS))
@pytest.mark.parametrize("method", ["wanda", "alps"])
def test_more_of_the_score_stays_and_the_model_computes_the_same(name, method):
    model, before = tiny_llama(), state(tiny_llama())
    expected = model(tokens()).logits
    step = only_permuted(model, config(name, method=method))
    assert not same_state(model, before)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert {weight.split(".")[-2] for weight in step.permuted} <= {"o_proj", "down_proj"}
    assert all(old < new for old, new in step.permuted.values()) and len(step.permuted) >= 3
    everything = {weight.name for weight in find_architecture(model).weights}
    assert set(step.left) | set(step.permuted) == everything and not set(step.left) & set(step.permuted)


@pytest.mark.parametrize("name", sorted(PERMUTATIONS))
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_budget_and_pattern_are_exact_and_a_saved_model_is_what_was_pruned(name, pattern, tmp_path):
    pruner = DSAPruner(tiny_llama())
    report = pruner.prune(tokens(), config(name, pattern))
    kept, width = map(int, pattern.split(":"))
    assert report.sparsity == 1 - kept / width and verify(pruner.model, report).holds and report.permuted
    for weight in find_architecture(pruner.model).weights:
        assert ((weight.tensor(pruner.model) != 0).unflatten(1, (-1, width)).sum(-1) == kept).all()
    assert "in another order" in str(report)
    pruner.save_pretrained(tmp_path)
    again = DSAPruner.from_pretrained(tmp_path)
    assert again.verify().holds and again.report.permuted == report.permuted and again.report.config.permute == name
    assert type(again.model) is type(pruner.model) and same_state(again.model, state(pruner.model))


@pytest.mark.parametrize("pattern", ["6:8", "8:16", "4:8", "2:4"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_patterns_of_wider_groups_are_pruned_saved_loaded_and_verified(pattern, method, tmp_path):
    pruner = DSAPruner(tiny_llama())
    report = pruner.prune(tokens(), config(None, pattern, method))
    kept, width = map(int, pattern.split(":"))
    assert report.sparsity == 1 - kept / width and not report.permuted
    pruner.save_pretrained(tmp_path)
    again = DSAPruner.from_pretrained(tmp_path)
    assert again.verify().holds and same_state(again.model, state(pruner.model))
    for weight in find_architecture(again.model).weights:
        assert ((weight.tensor(again.model) != 0).unflatten(1, (-1, width)).sum(-1) == kept).all()


@pytest.mark.parametrize(
    "method,update",
    [
        ("wanda", {}),
        ("wanda", {"true_sequential": True}),
        ("sparsegpt", {"targets": "dense"}),
        ("sparsegpt", {"targets": "dense", "true_sequential": True, "residual": True}),
    ],
)
def test_permuted_on_the_way_is_what_pruning_the_permuted_model_gives(method, update, monkeypatch):
    """With any order, as long as it is the same: statistics and the dense stream go along with the channels."""
    monkeypatch.setattr(Permute, "_order", backwards)
    one, other = tiny_llama(), tiny_llama()
    for walked in walk_blocks(other, find_architecture(other), [{"input_ids": tokens()}]):
        for found in coupling.find_couplings(walked)[0]:
            coupling.reorder_(walked, found, [backwards(*[None] * 4, places.columns, 2) for places in found.sets])
    asked = config(method=method, update=UpdateConfig(**update))
    assert len(prune(one, tokens(), asked).permuted) == 6
    prune(other, tokens(), config(None, method=method, update=UpdateConfig(**update)))
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=2e-3, atol=2e-3, msg=name)


def test_an_order_that_changes_what_the_block_gives_is_undone_and_named(monkeypatch, caplog):
    def wrong(walked):
        couplings, left = coupling.find_couplings(walked)
        # as if down's columns were made by gate alone
        return [coupling.Coupling(c.producers[:1], c.consumers, tuple(map(first, c.sets))) for c in couplings], left

    def first(places):
        return coupling.ChannelSet(places.columns, places.rows[:1])

    monkeypatch.setattr(permute, "find_couplings", wrong)
    model, before = tiny_llama(), state(tiny_llama())
    with caplog.at_level(logging.WARNING):
        step = only_permuted(model, config())
    for name, value in model.state_dict().items():
        assert ".mlp." not in name or torch.equal(value, before[name])
    assert {weight.split(".")[-2] for weight in step.permuted} == {"o_proj"}
    assert "layers.1.mlp.down_proj.weight: another order of channels changes what the block gives" in caplog.text
    assert "something else" in step.left["model.layers.1.mlp.down_proj.weight"]


def test_a_head_that_holds_no_whole_group_is_left(caplog):
    step = only_permuted(tiny_llama(), config(pattern="8:16"))  # heads of 8
    assert {weight.split(".")[-2] for weight in step.permuted} == {"down_proj"}
    assert "do not fill groups of 16" in step.left["model.layers.0.self_attn.o_proj.weight"]


def test_what_stays_where_it_is_is_named(tiny, inputs, caplog):
    with caplog.at_level(logging.INFO, logger=permute.__name__):
        report = prune(tiny("mixtral"), inputs("mixtral"), config())
        assert report.permuted and all("o_proj" in name for name in report.permuted)
        assert "16 weights stay where they are (experts of one parameter): model.layers.0.mlp.experts" in caplog.text
        assert "No channels" not in caplog.text
        prune(tiny("jetmoe"), inputs("jetmoe"), config())
        assert "No channels were put in another order: experts of one parameter" in caplog.text


def test_mixed_patterns_and_bfloat16_take_it_too():
    model = tiny_llama(num_hidden_layers=4).bfloat16()
    report = prune(model, tokens(), DSAConfig(0.5, "wanda", "atp", spread=0.25, pattern="mixed:8", permute="ria"))
    assert report.sparsity == 0.5 and verify(model, report).holds and report.permuted


def test_it_is_refused_where_it_cannot_do_anything():
    with pytest.raises(ValueError, match="pattern='row' has none; use pattern='2:4'"):
        DSAConfig(0.5, permute="ria")
    with pytest.raises(UnknownNameError, match="Did you mean 'ria'"):
        config("riaa")
    with pytest.raises(ValueError, match="statistics give nothing to run it on"):
        prune(tiny_llama(), CollectedStatistics({}, "elsewhere"), config(method="magnitude"))
    with pytest.raises(ValueError, match="calibration"):
        prune(tiny_llama(), None, config(method="magnitude"))
