"""Searches for methods that change what they keep: judged by masks and weights, exact, and gone on with."""

import json

import pytest

from optimum_dsa import DSAConfig, UpdateConfig, prune
from optimum_dsa.search.curves import OFFSETS
from optimum_dsa.search.realise.database import Database
from optimum_dsa.search.result import concordance
from optimum_dsa.search.trace import SearchTrace

from ..tiny import same_state, state, tiny_llama
from .searching import CALIBRATION, outcome
from .searching import run as run_any


def run(*args, **options):
    """A small search of a small model."""
    return run_any(*args, **{"model": tiny_llama(num_hidden_layers=2), "finalists": 2, **options})


WHOLE = DSAConfig(0.7, "sparsegpt", update=UpdateConfig(targets="dense", true_sequential=True, residual=True))


@pytest.mark.parametrize("strategy", ["curves", "descent"])
def test_finalists_have_the_exact_budget_and_are_what_prune_leaves(strategy):
    model = tiny_llama(num_hidden_layers=2)
    before = state(model)
    result = run(strategy, "3k tokens", model=model, config=WHOLE, named=["owl"])
    assert same_state(model, before)
    assert result.trace.settings["realisation"] == "database"
    total = sum(result.best.sizes.values())
    assert {sum(row.allocation.counts().values()) for row in result.finalists} == {round(0.7 * total)}
    assert len(result.finalists) >= 2
    losses = [row.loss for row in result.finalists]
    assert losses == sorted(losses) and "uniform" in [str(row.candidate) for row in result.finalists]
    report = prune(model, CALIBRATION, DSAConfig.from_dict(WHOLE.to_dict() | {"allocation": result.best.to_dict()}))
    assert report.removed == round(0.7 * total)


def test_how_well_the_proxy_ranks_is_printed_and_kept():
    result = run("named", "4k tokens", config=WHOLE, named=["owl", "atp"], finalists=3)
    assert -1 <= result.proxy_correlation <= 1 and -1 <= result.proxy_concordance <= 1
    shown, data = str(result), result.to_dict()
    line = f"{result.proxy_correlation:.2f} (Spearman), {result.proxy_concordance:.2f} (Kendall), over"
    assert line in shown and "proxy loss: matrices solved at levels about uniform" in shown
    assert data["proxy_correlation"] == result.proxy_correlation and data["proxy"].startswith("matrices solved")
    assert data["proxy_concordance"] == result.proxy_concordance


@pytest.mark.parametrize("strategy,lines", [("curves", 4), ("curves", 13), ("descent", 6)])
def test_one_that_was_killed_goes_on_to_the_same_end(strategy, lines, tmp_path):
    options = {"strategy": strategy, "budget": "2k tokens", "config": WHOLE, "named": ["owl"]}
    whole = run(folder=tmp_path / "whole", **options)
    text = (tmp_path / "whole" / "trace.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "trace.jsonl").write_text("".join(text[:lines]))
    assert outcome(run(folder=tmp_path / "cut", resume=True, **options)) == outcome(whole)
    assert json.loads((tmp_path / "cut" / "allocation.json").read_text()) == whole.best.to_dict()


def test_a_search_by_masks_is_not_gone_on_with_by_the_database(tmp_path):
    run("named", "1k tokens", config=WHOLE, named=[], folder=tmp_path / "s", realisation="masks")
    with pytest.raises(ValueError, match="made with realisation=None, not 'database'"):
        run("named", "1k tokens", config=WHOLE, named=[], folder=tmp_path / "s", resume=True)


def test_points_of_error_curves_are_trials_that_cost_no_text(tmp_path):
    run("curves", "2k tokens", config=WHOLE, folder=tmp_path / "s")
    trials = [
        trial for trial in SearchTrace.load(tmp_path / "s" / "trace.jsonl").trials if trial.request.kind == "errors"
    ]
    assert trials and all(trial.tokens == 0 and 0 <= trial.loss <= 1 for trial in trials)
    assert all(len(trial.slopes) == 14 and all(0 <= error <= 1.5 for error in trial.slopes) for trial in trials)


def test_curves_solve_what_they_read_and_race_by_no_proxy(monkeypatch):
    grids, grid = [], Database._grid
    monkeypatch.setattr(Database, "_grid", lambda *args: grids.append(grid(*args)) or grids[-1])
    result = run("curves", "2k tokens", config=WHOLE)
    kinds = [trial.request.kind for trial in result.trace.trials]
    assert "loss" not in kinds and {len(levels) for levels in grids} == {1 + 2 * len(OFFSETS)}
    assert len(grids) == 14 * kinds.count("anchor") and kinds.count("anchor") == kinds.count("slopes") >= 3
    assert all(row.proxy is None for row in result.finalists) and "proxy" not in str(result)


def test_methods_without_an_update_have_curves_where_a_strategy_reads_them():
    assert run("curves", "4k tokens").trace.settings["realisation"] == "database"
    assert "realisation" not in run("named", "4k tokens", named=["owl"]).trace.settings


def test_concordance_is_kendalls():
    assert concordance([1, 2, 3], [10, 20, 30]) == 1
    assert concordance([1, 2, 3], [3, 2, 1]) == -1
    assert concordance([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert concordance([1, 1], [1, 2]) == 0
