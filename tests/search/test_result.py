"""What a search says at its end."""

import json
from dataclasses import replace

import pytest

from optimum_dsa import Allocation, DSAConfig, plot_search
from optimum_dsa.search.problem import Budget
from optimum_dsa.search.result import Finalist, SearchResult, rank_correlation, robustness_table
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import Request, SearchTrace, Trial


def finalist(name, loss, proxy, perplexity=9.0):
    sizes = {"h.0.a": 10, "h.1.a": 10}
    return Finalist(Candidate(name), loss, perplexity, proxy, Allocation({"h.0.a": 0.4, "h.1.a": 0.6}, sizes, name))


def result(*finalists, **changes):
    trace = SearchTrace(settings={"strategy": "named"})
    trace.append(Trial(0, Request("loss", Candidate(), 0, 2), 0.5, tokens=40, counts=(4, 6)))
    budget = Budget(tokens=100, spent_tokens=12_345, spent_evaluations=7, spent_seconds=61.23456)
    return SearchResult(DSAConfig(0.5), finalists, trace, budget, **changes)


def test_the_correlation_needs_three_that_have_both_numbers():
    rows = [finalist("a", 0.1, 0.2), finalist("b", 0.2, 0.1), finalist("c", 0.3, 0.3)]
    assert result(*rows[:2]).proxy_correlation is None
    assert result(*rows[:2], finalist("d", 0.4, None)).proxy_correlation is None
    assert result(*rows).proxy_correlation == pytest.approx(0.5)
    assert result(*rows, finalist("d", 0.4, None)).proxy_correlation == pytest.approx(0.5)


def test_ranks_are_shared_by_equal_values():
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert rank_correlation([5, 1, 5, 5], [1, 2, 3, 4]) == pytest.approx(0.2581988897)
    assert rank_correlation([1, 2, 3], [4, 4, 4]) == 0


def test_the_outcome_is_printed_best_first_with_what_it_cost():
    shown = str(result(finalist("a", 0.12345, 0.2), finalist("b", 0.2, None), notes=("a note",)))
    lines = shown.splitlines()
    assert lines[0].split() == ["validation", "loss", "perplexity", "proxy", "loss", "allocation"]
    assert lines[1].split() == ["0.1235", "9.00", "0.2000", "a"] and lines[2].split() == ["0.2000", "9.00", "b"]
    cost = "1 trials, 12,345 validation tokens, 61 s; the budget was 100 tokens, and the finalists came on top"
    assert lines[-2:] == [cost, "a note"]
    assert "rank correlation" not in shown
    three = result(finalist("a", 0.1, 0.2), finalist("b", 0.2, 0.1), finalist("c", 0.3, 0.3))
    assert "rank correlation of the proxy with the prune: 0.50" in str(three)


def test_the_winner_and_the_costs_are_saved(tmp_path):
    found = result(finalist("a", 0.1, 0.2), finalist("b", 0.2, None), notes=("a note",), baselines={
        "uniform": Allocation({"h.0.a": 0.5, "h.1.a": 0.5}, {"h.0.a": 10, "h.1.a": 10}, "uniform")
    })  # fmt: skip
    found.save(tmp_path / "deep" / "out", plot_search)
    assert Allocation.load(tmp_path / "deep" / "out") == found.best == found.finalists[0].allocation
    data = json.loads((tmp_path / "deep" / "out" / "search.json").read_text())
    assert [row["validation_loss"] for row in data["finalists"]] == [0.1, 0.2]
    assert [row["proxy_loss"] for row in data["finalists"]] == [0.2, None]
    assert [row["candidate"] for row in data["finalists"]] == [{"function": "a"}, {"function": "b"}]
    assert (data["trials"], data["tokens"], data["evaluations"], data["seconds"]) == (1, 12_345, 7, 61.235)
    assert data["notes"] == ["a note"] and data["baselines"].keys() == {"uniform"}
    assert DSAConfig.from_dict(data["config"]) == found.config
    for name, figure in plot_search(found).items():
        picture = (tmp_path / "deep" / "out" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        width, height = (int.from_bytes(picture[start : start + 4], "big") for start in (16, 20))
        assert [width, height] == pytest.approx((200 * figure.get_size_inches()).tolist(), abs=1)
    found.save(tmp_path / "deep" / "out", plot_search)
    with pytest.warns(FutureWarning, match="plot_search"):
        assert found.figures().keys() == plot_search(found).keys() == {"search", "allocation", "heatmap"}


def test_without_pictures_or_without_matplotlib_there_is_the_result_alone(tmp_path):
    def missing(result):
        raise ImportError("matplotlib")

    found = result(finalist("a", 0.1, 0.2))
    for name, pictures in (("plain", None), ("missing", missing)):
        found.save(tmp_path / name, pictures)
        assert {file.name for file in (tmp_path / name).iterdir() if not file.name.startswith(".")} >= {
            "allocation.json", "search.json"
        }  # fmt: skip
        assert not list((tmp_path / name).glob("*.png"))


def test_what_the_finalists_cost_and_what_came_on_top_is_said():
    budget = Budget(tokens=1000, spent_tokens=900, strategy_tokens=600)
    shown = str(replace(result(finalist("a", 0.1, 0.2)), budget=budget))
    assert "900 validation tokens (300 of them to rank the finalists), 0 s; the budget was 1,000 tokens" in shown
    assert "on top" not in shown
    assert "on top" in str(replace(result(finalist("a", 0.1, 0.2)), budget=replace(budget, spent_tokens=1001)))


def test_a_pattern_that_rounds_shows_what_it_removes():
    sizes = {"h.0.a": 10, "h.1.a": 10}
    row = replace(finalist("a", 0.1, 0.2), removed=Allocation({"h.0.a": 0.5, "h.1.a": 0.6}, sizes, "a"))
    lines = str(result(row, finalist("b", 0.2, 0.2))).splitlines()
    assert lines[0].split()[-2:] == ["removed", "allocation"]
    assert lines[1].split()[-2:] == ["0.5500", "a"] and lines[2].split()[-2:] == ["0.5000", "b"]
    assert result(row).to_dict()["finalists"][0]["removed"] == 0.55


def test_one_seed_has_no_scatter():
    assert len(robustness_table([result(finalist("a", 0.1, 0.2))]).splitlines()) == 2
    two = [result(finalist("a", loss, 0.2, 10 * loss)) for loss in (0.1, 0.3)]
    *_, mean, scatter = robustness_table(two).splitlines()
    assert mean.split() == ["mean", "0.2000", "2.00"] and scatter.split()[:3] == ["±", "0.1414", "1.41"]
