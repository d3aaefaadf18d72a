"""Pictures of what other rooms found."""

import logging
import sys

import pytest

from optimum_dsa import DSAConfig, DSAPruner, plot_search
from optimum_dsa.sharing.drawing import plain

from ..tiny import tiny_llama, tokens
from .test_charts import lines


def run(folder):
    config = DSAConfig(0.7, max_sparsity=0.95)
    return DSAPruner(tiny_llama()).search(tokens(), config, "named", "2k tokens", tokens(8, 16, seed=5), folder)


def test_a_search_leaves_pictures_beside_its_result(tmp_path):
    result = run(tmp_path)
    for name in ("search", "allocation", "heatmap"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    figures = plot_search(result)
    assert list(figures) == ["search", "allocation", "heatmap"]
    drawn = lines(figures["allocation"])
    assert list(drawn) == ["found", "uniform", "owl"]
    assert drawn["uniform"] == pytest.approx([0.7] * 3, abs=1e-3)
    owl = next(trial for trial in result.trace.trials if trial.request.candidate.function == "owl")
    assert sum(owl.counts) == sum(result.baselines["owl"].counts().values())
    assert drawn["owl"] == pytest.approx(list(result.baselines["owl"].sparsity.values()))
    assert drawn["owl"] != pytest.approx([0.7] * 3, abs=1e-3)


def test_the_curve_of_a_search_is_named_after_its_strategy_and_says_that_it_is_a_proxy(tmp_path):
    curve = plot_search(run(tmp_path))["search"]
    assert list(lines(curve)) == [plain("named")]
    assert "proxy" in curve.axes[0].get_ylabel()


def test_without_matplotlib_a_search_has_no_pictures(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.INFO, "optimum_dsa"):
        run(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"allocation.json", "search.json", "trace.jsonl", "dsa_manifest.json"}
    assert "No pictures beside the search" in caplog.text
