"""Searches for a metric, alone and with an allocation: replayed, resumed, and pruned with what they found."""

import pytest
import torch

from optimum_dsa import Allocation, DSAConfig, DSAPruner, DSAStructuredConfig
from optimum_dsa.pruning.prune import prune
from optimum_dsa.search.trace import SearchTrace

from ..tiny import tiny_llama, tokens
from .searching import CALIBRATION, outcome, run


STRATEGIES = ("symbolic", "joint", "optishear")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_stopped_anywhere_ends_as_one_that_was_not(strategy, tmp_path):
    whole = run(strategy, "1200 tokens", folder=tmp_path / "whole", finalists=2)
    lines = (tmp_path / "whole" / "trace.jsonl").read_text().splitlines(keepends=True)
    for kept in (2, len(lines) // 2):
        part = tmp_path / f"part-{kept}"
        part.mkdir()
        (part / "trace.jsonl").write_text("".join(lines[:kept]) + lines[kept][:7])
        again = run(strategy, "1200 tokens", folder=part, resume=True, finalists=2)
        assert outcome(again) == outcome(whole)
    assert whole.budget.spent_tokens <= 1200
    read = SearchTrace.load(tmp_path / "whole" / "trace.jsonl")
    assert [trial.request for trial in read.trials] == [trial.request for trial in whole.trace.trials]
    assert len({trial.request.candidate.metric for trial in read.trials}) > 5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prune_takes_metric_and_allocation_from_the_folder(strategy, tmp_path):
    """And the model that it writes says both, and comes back with them where the folder is no more."""
    found = run(strategy, "1200 tokens", folder=tmp_path / "found", finalists=2)
    best = next(row for row in found.finalists if row.candidate.metric)
    best.allocation.save(tmp_path / "found" / "allocation.json")
    pruner = DSAPruner(tiny_llama())
    report = pruner.prune(tokens(), DSAConfig(0.7, allocation=str(tmp_path / "found")))
    assert report.config.metric == best.candidate.metric
    model = tiny_llama()
    prune(model, CALIBRATION, DSAConfig(0.7, allocation=best.allocation))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in pruner.model.state_dict().items())
    pruner.save_pretrained(tmp_path / "pruned")
    (tmp_path / "found" / "allocation.json").unlink()
    again = DSAPruner.from_pretrained(tmp_path / "pruned")
    assert again.report.config.metric == best.candidate.metric and again.verify().holds


def test_metrics_are_compared_at_the_configs_allocation():
    for allocation in ("owl", "abslog/var/atan,asin/no_op@+0.08"):
        config = DSAConfig(0.7, allocation=allocation)
        trials = run("symbolic", "600 tokens", config=config, finalists=1).trace.trials
        tried = {trial.request.candidate.function for trial in trials if trial.request.candidate.metric}
        assert tried == {allocation}
    given = run("ramp", "1k tokens", finalists=1).finalists[0].allocation
    trials = run("symbolic", "600 tokens", config=DSAConfig(0.7, allocation=given), finalists=1).trace.trials
    counts = {trial.counts for trial in trials if trial.request.candidate.metric}
    assert len(counts) == 1 and sum(*counts) == sum(given.counts().values())


def test_an_allocation_of_another_model_is_refused():
    other = Allocation({"a": 0.7}, {"a": 10})
    with pytest.raises(ValueError, match="names other units"):
        run("symbolic", "400 tokens", config=DSAConfig(0.7, allocation=other))


def test_a_trace_at_another_allocation_is_not_gone_on_with(tmp_path):
    run("symbolic", "400 tokens", config=DSAConfig(0.7, allocation="owl"), folder=tmp_path, finalists=1)
    with pytest.raises(ValueError, match="owl"):
        run(
            "symbolic", "1k tokens", config=DSAConfig(0.7, allocation="dlp"), folder=tmp_path, resume=True, finalists=1
        )


def test_the_winner_is_never_worse_than_uniform_by_the_configs_own_metric():
    table = run("joint", "2k tokens").finalists
    own = next(row for row in table if row.candidate.function == "uniform" and row.candidate.metric is None)
    assert table[0].loss <= own.loss and len({(row.candidate.metric, str(row.removed)) for row in table}) == len(table)
    assert all(row.allocation.metric == row.candidate.metric for row in table)


def test_where_no_metric_would_be_asked_there_is_nothing_to_search_for():
    with pytest.raises(ValueError, match="chooses itself"):
        run("symbolic", config=DSAConfig(0.7, "alps"))
    with pytest.raises(ValueError, match="is of single weights"):
        run("joint", config=DSAStructuredConfig(0.3, structures=("ffn",), layout="per_layer"))
    with pytest.raises(ValueError, match="compares metrics"):
        run("joint", realisation="database")


def test_an_allocation_file_with_a_hostile_metric_is_refused(tmp_path):
    Allocation({"a": 0.5}, {"a": 4}, metric="__import__(W)").save(tmp_path / "allocation.json")
    with pytest.raises(KeyError, match="__import__"):
        DSAConfig(0.5, allocation=str(tmp_path))
