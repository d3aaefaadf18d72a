"""What goes in rounds, and what is fitted to what the dense model has."""

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.prune import prune_structures
from optimum_dsa.pruning.structured.refit import refit_columns

from ...tiny import tiny_llama, tokens
from .test_prune import demo, demo_llama  # noqa: F401 - a fixture


FIRST = "model.layers.0.mlp.down_proj.weight"


def first_reader():
    """Of the first MLP what reads its channels, and the statistics of them, in the dense model."""
    model = tiny_llama()
    walked = next(walk_blocks(model, find_architecture(model), [{"input_ids": tokens(32)}], reads={"gram"}))
    return walked.tensor(next(weight for weight in walked.weights if weight.name == FIRST)), walked.statistics[FIRST]


def cut(importance, **settings):
    model = tiny_llama()
    report = prune_structures(model, tokens(32), DSAStructuredConfig(0.3, importance=importance, **settings))
    return model.get_parameter(FIRST).detach(), list(report.gone["model.layers.0:ffn"])


def error(weight, statistics, gone):
    """tr((W − Ŵ)·X·Xᵀ·(W − Ŵ)ᵀ) of the best Ŵ without these columns."""
    without = torch.zeros(weight.shape[1], dtype=torch.bool)
    without[gone] = True
    change = refit_columns(weight, statistics, without) - weight
    return float((change @ statistics.second_moment * change).sum())


def test_rounds_choose_anew_and_lose_less():
    weight, statistics = first_reader()
    chosen = {rounds: cut("obs", rounds=rounds)[1] for rounds in (1, 2, 48)}
    lost = {rounds: error(weight, statistics, gone) for rounds, gone in chosen.items()}
    assert len({tuple(gone) for gone in chosen.values()}) > 1 and lost[48] < lost[1]
    assert {len(gone) for gone in chosen.values()} == {len(chosen[1])}


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_is_left_is_the_refit_of_the_whole(rounds):
    weight, statistics = first_reader()
    found, gone = cut("obs", rounds=rounds)
    without = torch.zeros(weight.shape[1], dtype=torch.bool)
    without[gone] = True
    torch.testing.assert_close(found, refit_columns(weight, statistics, without)[:, ~without], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"importance": "wanda_sp", "update": "none"}, {"importance": "taylor"}])
def test_rounds_that_would_change_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="rounds=5 is read by importances that a refit changes alone"):
        cut(**settings, rounds=5)


def hidden(model, batch):
    with torch.no_grad():
        return model.model(batch).last_hidden_state


def test_dense_targets_make_up_for_what_was_lost_before(demo):  # noqa: F811
    calibration, _ = demo
    dense = hidden(demo_llama(), calibration)
    lost = {}
    for name, settings in {
        "sparse": {},
        "dense": {"targets": "dense"},
        "residual": {"targets": "dense", "residual": True},
    }.items():
        model = demo_llama()
        prune_structures(model, calibration, DSAStructuredConfig(0.3, ("ffn", "head"), "obs", **settings))
        lost[name] = float((hidden(model, calibration) - dense).square().mean())
    assert lost["residual"] < lost["dense"] < lost["sparse"]


def test_where_nothing_went_before_dense_targets_change_nothing():
    sparse, dense = (cut("obs", targets=targets) for targets in ("sparse", "dense"))
    assert sparse[1] == dense[1] and torch.equal(sparse[0], dense[0])
