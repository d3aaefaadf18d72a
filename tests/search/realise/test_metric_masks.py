"""Masks of another metric for every candidate are those that a model with that metric would have."""

import pytest
import torch

from optimum_dsa import Calibration, DSAConfig
from optimum_dsa.search.objective import Objective
from optimum_dsa.search.realise import realise

from ...tiny import tiny_llama, tokens
from ..toy import counts_of, judge


METRICS = (None, "abs(W)", "mul(abs(W), sqrt(X))", "magnitude")
CALIBRATION = Calibration({"input_ids": tokens()}, "x")


@pytest.fixture(scope="module")
def model():
    made = tiny_llama()
    for parameter in made.parameters():
        parameter.data *= 3
    return made


def judged(model, config, kind="metrics"):
    return Objective(model, realise(model, CALIBRATION, config, kind), tokens(4, 16, seed=5), 4, 30)


@pytest.mark.parametrize("method", ["wanda", "magnitude", "wanda+refit"])
def test_each_metric_gives_the_losses_of_a_search_that_has_it_alone(method, model):
    """One-shot, and after the prune, whatever was looked at before."""
    config = DSAConfig(0.6, method)
    found = judged(model, config)
    for metric in (*METRICS, *METRICS):
        alone = judge(model, CALIBRATION, tokens(4, 16, seed=5), DSAConfig(0.6, method, metric=metric), 30)
        counts = counts_of(found, 0.6)
        found.take_metric(metric)
        rows = range(4)
        assert found.loss(counts, rows) == pytest.approx(alone.loss(counts, rows), rel=1e-5)
        assert found.sequential(counts, rows) == pytest.approx(alone.sequential(counts, rows), rel=1e-5)
        assert found.loss(counts, rows) == pytest.approx(alone.loss(counts, rows), rel=1e-5)


def test_another_allocation_of_the_same_metric_has_other_masks(model):
    found = judged(model, DSAConfig(0.6))
    losses = [found.loss(counts_of(found, share), range(4)) for share in (0.6, 0.4, 0.6)]
    assert losses[0] == losses[2] != losses[1]


def test_statistics_are_read_once_and_weights_never_change(model, monkeypatch):
    from optimum_dsa.search.realise import metric_masks

    walks, walk = [], metric_masks.walk_blocks
    monkeypatch.setattr(metric_masks, "walk_blocks", lambda *a, **k: (walks.append(1), walk(*a, **k))[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = judged(model, DSAConfig(0.6))
    for metric in METRICS:
        found.take_metric(metric)
        found.loss(counts_of(found, 0.6), range(2))
    assert len(walks) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_slopes_are_refused(model):
    found = judged(model, DSAConfig(0.6))
    with pytest.raises(ValueError, match="compared without slopes"):
        found.slopes(counts_of(found, 0.6), range(2))
