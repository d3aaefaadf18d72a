"""Which matrices an update leaves alone: what is tried, and what is chosen."""

import logging

import pytest
import torch

from optimum_dsa import Calibration, DSAConfig, DSAPruner, UpdateConfig, find_architecture, prune
from optimum_dsa.pruning.unstructured.metrics import METRICS
from optimum_dsa.search import still
from optimum_dsa.search.still import kinds_of_heads, with_still

from ..tiny import same_state, state, tiny_llama, tokens


QKV = [f"self_attn.{name}_proj" for name in "qkv"]


def test_kinds_of_heads_are_found_by_structure(tiny):
    for family, kinds in {
        "llama": QKV,
        "gpt2": ["attn.c_attn"],
        "opt": ["q", "k", "v"],
        "bloom": ["query_key_value"],
    }.items():
        model = tiny(family)
        found = kinds_of_heads(model, find_architecture(model), tokens(1, 8))
        assert len(found) == len(kinds), (family, found)
        assert all(any(kind in name for name in found) for kind in kinds), (family, found)
    model = tiny("llama")
    assert kinds_of_heads(model, find_architecture(model, exclude=("q_proj",)), tokens(1, 8)) == QKV[1:]


def test_matrices_that_are_left_alone_lose_weights_and_keep_the_others_as_they_were():
    model = tiny_llama()
    before = state(model)
    update = UpdateConfig(still=("q_proj", "layers.1.mlp"))
    report = prune(model, tokens(), DSAConfig(0.6, "d2prune", "uniform", update=update))
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)
    for weight in find_architecture(model).weights:
        new, old = weight.tensor(model), before[weight.name]
        assert int((new == 0).sum()) == pytest.approx(0.6 * weight.size, abs=1)
        same = torch.equal(new[new != 0], old[new != 0])
        assert same == ("q_proj" in weight.name or "layers.1.mlp" in weight.name)


def test_they_are_scored_by_their_own_metric():
    """The first block's q, which sees the inputs of the dense model."""
    model = tiny_llama()
    from optimum_dsa.model.walk import walk_blocks

    walked = next(walk_blocks(model, find_architecture(model), [{"input_ids": tokens()}], reads={"inputs", "gram"}))
    name = "model.layers.0.self_attn.q_proj.weight"
    scores = METRICS["d2_still"](walked.tensor(walked.weights[0]), walked.statistics[name])
    before = state(model)
    with pytest.raises(ValueError, match="still: no matrix that is pruned is named 'q_porj'"):
        prune(model, tokens(), DSAConfig(0.5, "d2prune", "uniform", update=UpdateConfig(still=("q_proj", "q_porj"))))
    assert same_state(model, before)
    prune(model, tokens(), DSAConfig(0.5, "d2prune", "uniform", update=UpdateConfig(still=("q_proj",))))
    kept = model.get_parameter(name) != 0
    assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_choice_is_of_the_lowest_perplexity(pattern, caplog):
    model = tiny_llama()
    before = state(model)
    config = DSAConfig(0.5, "d2prune", "uniform", pattern=pattern)
    with caplog.at_level(logging.INFO, "optimum_dsa"):
        found = with_still(model, Calibration({"input_ids": tokens()}, "x"), tokens(4, seed=1), config)
    assert same_state(model, before)
    tried = [record.args for record in caplog.records if "left as they are" in record.message]
    assert len(tried) == 8
    best = min(tried, key=lambda args: args[2])[1]
    assert (", ".join(found.update.still) or "none") == best
    loss = {}
    for choice in {found.update.still, (), tuple(QKV)}:
        pruned = tiny_llama()
        prune(
            pruned, tokens(), DSAConfig(0.5, "d2prune", "uniform", pattern=pattern, update=UpdateConfig(still=choice))
        )
        ids = tokens(4, seed=1)
        with torch.no_grad():
            loss[choice] = pruned(ids, labels=ids).loss.exp().item()
        shown = next(args[2] for args in tried if args[1] == (", ".join(choice) or "none"))
        assert loss[choice] == pytest.approx(shown, rel=1e-4)


def test_the_facade_chooses_and_says_what(monkeypatch):
    monkeypatch.setattr(still, "_choices", lambda kinds: [(), (QKV[1],)])
    pruner = DSAPruner(tiny_llama())
    report = pruner.prune(tokens(10), DSAConfig(0.6, "d2prune", "owl"))
    assert report.config.update.still in [(), (QKV[1],)] and report.calibration["samples"] == 8
    assert pruner.verify().holds
    given = DSAPruner(tiny_llama())
    monkeypatch.setattr(still, "_choices", lambda kinds: pytest.fail("nothing is to be tried"))
    report = given.prune(tokens(10), DSAConfig(0.6, "d2prune", "owl", update=UpdateConfig(still=("v_proj",))))
    assert report.config.update.still == ("v_proj",) and report.calibration["samples"] == 10


def test_what_cannot_be_chosen_is_said():
    with pytest.raises(ValueError, match="are matrices that the update leaves alone, and method 'wanda' has none"):
        DSAConfig(0.5, "wanda", update=UpdateConfig(still=("q_proj",)))
    with pytest.raises(ValueError, match="method='d2prune' compares prunes on text; pass some, or name the matrices"):
        DSAPruner(tiny_llama()).prune(None, DSAConfig(0.6, "d2prune", "uniform"))
    with pytest.raises(ValueError, match="method='d2prune' needs windows to judge by"):
        DSAPruner(tiny_llama()).prune(tokens(1), DSAConfig(0.6, "d2prune", "uniform"))


def test_of_many_kinds_each_is_tried_alone():
    assert list(still._choices("ab")) == [(), ("a",), ("b",), ("a", "b")]
    assert list(still._choices("abcd")) == [(), ("a",), ("b",), ("c",), ("d",), ("a", "b", "c", "d")]
