"""Methods that read gradients go wherever others go, and are refused by name where they cannot."""

import pytest
import torch

from optimum_dsa import Calibration, DSAConfig, DSAPruner, UpdateConfig, find_architecture, prune
from optimum_dsa.model.gradients import collect_gradients
from optimum_dsa.pruning.steps import RemoveWeights
from optimum_dsa.search.search import search

from ..tiny import same_state, state, tiny_llama, tokens


CALIBRATION = Calibration({"input_ids": tokens()}, "tokens")
READ = ["gblm", "pruner_zero", "wanda++"]


@pytest.mark.parametrize("method", READ)
@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "mixed:8", "allocation": "atp", "sparsity": 0.5},
        {"update": UpdateConfig(true_sequential=True)},
        {"update": UpdateConfig("sparsegpt", targets="dense")},
        {"allocation_metric": "gblm", "allocation": "owl"},
        {"reconstruct": 2},
    ],
    ids=["mixed", "true sequence", "update", "allocation", "reconstruct"],
)
def test_they_go_with_what_other_methods_go_with(method, settings):
    model = tiny_llama()
    report = prune(
        model, tokens(), DSAConfig(**{"sparsity": 0.6, "method": method, "allocation": "uniform", **settings})
    )
    assert report.sparsity == pytest.approx(settings.get("sparsity", 0.6), abs=1e-4)


def test_masks_are_by_gradients_of_the_dense_model_whatever_is_pruned_before():
    model = tiny_llama()
    architecture = find_architecture(model)
    gradients = collect_gradients(model, architecture, [{"input_ids": tokens()}])
    before = state(model)
    prune(model, tokens(), DSAConfig(0.5, "pruner_zero", "uniform"))
    for weight in architecture.weights:
        scores = weight.matrix(before[f"{weight.module}.{weight.attribute}"]).square() * gradients[weight.name]
        low = gradients[weight.name].min() * weight.matrix(before[weight.name]).square()
        kept = weight.tensor(model) != 0
        scores = scores - low
        for row, stays in zip(scores, kept):
            assert row[stays].min() >= row[~stays].max()


@pytest.mark.parametrize("method", ["gblm", "wanda++"])
def test_a_prune_that_goes_on_ends_as_an_uninterrupted_one(method, tmp_path, monkeypatch):
    config, plain = DSAConfig(0.6, method, "owl"), RemoveWeights.__call__
    whole = tiny_llama()
    prune(whole, tokens(), config)

    def stops(self, walked):
        if walked.name.endswith("2"):
            raise KeyboardInterrupt
        plain(self, walked)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RemoveWeights, "__call__", stops)
        prune(tiny_llama(), tokens(), config, checkpoints=tmp_path / "work")
    again = tiny_llama()
    prune(again, tokens(), config, checkpoints=tmp_path / "work", resume=True)
    assert same_state(again, state(whole))


@pytest.mark.parametrize("method", ["gblm", "wanda++"])
def test_a_search_under_them_ends_at_what_prune_makes(method):
    model = tiny_llama()
    before = state(model)
    config = DSAConfig(0.6, method, "uniform")
    result = search(model, CALIBRATION, tokens(4, seed=1), config, strategy="named", named=["owl"])
    assert same_state(model, before)
    report = prune(model, tokens(), DSAConfig(0.6, method, result.best))
    assert report.allocation.counts() == result.finalists[0].allocation.counts()


def test_a_search_tries_allocations_that_run_the_model_where_they_are_named():
    model = tiny_llama()
    before = state(model)
    config = DSAConfig(0.6, "wanda", "uniform", allocation_metric="gblm")
    named = ["besa", "als"]
    result = search(model, CALIBRATION, tokens(4, seed=1), config, strategy="named", named=named, finalists=3)
    assert same_state(model, before)
    found = {row.candidate.function: row.allocation for row in result.finalists}
    assert {"uniform", *named} == found.keys()
    for name in named:
        asked = DSAConfig(0.6, "wanda", name, allocation_metric="gblm")
        mine = prune(tiny_llama(), tokens(), asked).allocation
        assert mine.counts() == found[name].counts(), name


def test_another_order_of_channels_is_refused():
    for method in READ:
        with pytest.raises(ValueError, match="permute='ria' puts channels in another order, and metric .* gradients"):
            DSAConfig(0.5, method, "uniform", pattern="2:4", permute="ria")


def test_offloaded_models_have_gradients_of_a_block_and_none_of_the_loss(tmp_path):
    expected = tiny_llama()
    expected.save_pretrained(tmp_path / "model")
    prune(expected, tokens(), DSAConfig(0.6, "wanda++", "uniform"))
    places = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload", "dtype": torch.float32}
    found = DSAPruner.from_pretrained(tmp_path / "model", **places)
    with pytest.raises(ValueError, match=r"\(offloaded\); load it without offloading, or choose a metric"):
        found.prune(tokens(), DSAConfig(0.6, "gblm", "uniform"))
    with pytest.raises(ValueError, match="allocation 'besa' runs the model again and again .* such as 'owl'"):
        found.prune(tokens(), DSAConfig(0.6, "wanda", "besa"))
    report = found.prune(tokens(), DSAConfig(0.6, "wanda++", "uniform"))
    assert report.sparsity == pytest.approx(0.6, abs=1e-4)
    found.save_pretrained(tmp_path / "pruned")
    again = DSAPruner.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    assert same_state(again.model, state(expected))


def test_a_model_without_a_loss_is_refused_before_anything_is_done(tmp_path):
    headless = tiny_llama().model
    with pytest.raises(ValueError, match="predicts no tokens, so there is no loss"):
        prune(headless, CALIBRATION, DSAConfig(0.6, "gblm", "owl"), checkpoints=tmp_path / "work")
    assert not (tmp_path / "work").exists()
