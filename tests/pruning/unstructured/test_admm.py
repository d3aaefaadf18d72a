"""ADMM by one eigendecomposition, or by a factor for every penalty: the same answer."""

import pytest
import torch

from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.unstructured import admm as module
from optimum_dsa.pruning.unstructured.admm import admm
from optimum_dsa.pruning.unstructured.choice import Choice
from optimum_dsa.pruning.unstructured.objective import layer_error
from optimum_dsa.pruning.unstructured.patterns import Pattern

from .test_updates import problem


def both(monkeypatch, weight, statistics, choice):
    """The answers by the spectrum and by factors."""
    found = []
    for largest in (weight.shape[1], weight.shape[1] - 1):
        statistics.release_()
        monkeypatch.setattr(module, "LARGEST", largest)
        found.append(admm(weight, statistics, choice))
        assert ("spectrum" not in statistics._derived) == (largest < weight.shape[1] or statistics.tokens == 0)
    return found


@pytest.mark.parametrize("rows", [8, 60], ids=["solved", "inverted"])
@pytest.mark.parametrize("text", ["matrix", "row", "2:4", "group:32"])
def test_a_factor_for_every_penalty_finds_what_the_spectrum_does(text, rows, monkeypatch):
    weight, statistics, _ = problem(rows, 96)
    removed = weight.numel() // 2
    one, other = both(monkeypatch, weight, statistics, Choice(Pattern.parse(text), removed))
    assert int((one == 0).sum()) == int((other == 0).sum()) == removed
    assert ((one == 0) == (other == 0)).float().mean() > 0.97
    errors = [layer_error(weight, new, statistics.gram) for new in (one, other)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_fewer_tokens_than_inputs_and_inputs_that_never_fired(damping, monkeypatch):
    weight, _, x = problem(24, 64)
    statistics = LayerStatistics(64, with_gram=True)
    x[:, 5] = 0
    statistics.update_(x[:20])
    choice = Choice(Pattern("matrix"), weight.numel() * 7 // 10, damping=damping)
    one, other = both(monkeypatch, weight, statistics, choice)
    for new in (one, other):
        assert new.isfinite().all() and int((new == 0).sum()) == choice.count and not new[:, 5].any()
    errors = [layer_error(weight, new, statistics.gram) for new in (one, other)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1, abs=1e-4)


def test_a_penalty_under_which_there_is_no_factor_falls_back_on_the_spectrum():
    statistics = LayerStatistics(2, with_gram=True)
    # of rank one, and rounded to below it
    statistics.gram.copy_(torch.tensor([[1.0, 1.0000001], [1.0000001, 1.0]]))
    statistics.tokens = 1
    matrix = torch.tensor([[1.0, 2.0]])
    (scale, by_factor), (same, by_spectrum) = (
        way(statistics, 0.0, 1) for way in (module._by_factor, module._by_spectrum)
    )
    assert torch.equal(scale, same)
    torch.testing.assert_close(by_factor(1e-9)(matrix), by_spectrum(1e-9)(matrix))
    torch.testing.assert_close(by_factor(0.5)(matrix), by_spectrum(0.5)(matrix))
