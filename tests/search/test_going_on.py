"""Searches that were interrupted: gone on with to the same end, and only as what they were."""

import json
import logging

import pytest

from optimum_dsa import (
    Calibration,
)
from optimum_dsa.search.evaluator import Evaluator
from optimum_dsa.search.search import search

from ..tiny import tiny_llama, tokens
from .searching import CALIBRATION, CONFIG, VALIDATION, outcome, run


def other_model():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-4
    return model


@pytest.mark.parametrize(
    "what,model,calibration,validation",
    [
        ("model", other_model(), CALIBRATION, VALIDATION),
        ("calibration", tiny_llama(), Calibration({"input_ids": tokens(seed=9)}, "x"), VALIDATION),
        ("validation", tiny_llama(), CALIBRATION, tokens(8, 16, seed=6)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_search_goes_on_with_the_model_and_the_texts_that_it_began_with_alone(
    what, model, calibration, validation, tmp_path
):
    run("named", folder=tmp_path / "s")
    before = (tmp_path / "s" / "trace.jsonl").read_bytes()
    options = {"strategy": "named", "budget": "4k tokens", "folder": tmp_path / "s", "resume": True}
    with pytest.raises(ValueError, match=f"was made with another {what}"):
        search(model, calibration, validation, CONFIG, **options)
    assert (tmp_path / "s" / "trace.jsonl").read_bytes() == before
    search(tiny_llama(), CALIBRATION, VALIDATION, CONFIG, **options)


def test_a_trace_that_does_not_say_what_it_is_of_is_not_gone_on_with(tmp_path):
    run("named", folder=tmp_path / "s")
    path = tmp_path / "s" / "trace.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    settings = json.loads(first)["settings"]
    del settings["sha256"]
    path.write_text(json.dumps({"settings": settings}) + "\n" + "".join(rest))
    with pytest.raises(ValueError, match="does not say with which model it was made"):
        run("named", folder=tmp_path / "s", resume=True)


def test_to_go_on_where_there_is_nothing_is_said(tmp_path, caplog):
    run("named", folder=tmp_path / "s", resume=True)
    assert "holds no search to go on with; a new one begins" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "optimum_dsa"):
        run("named", folder=tmp_path / "s", resume=True)
    assert not caplog.records


@pytest.mark.parametrize("strategy", ["auto", "evolution", "level_switch"])
@pytest.mark.parametrize("lines", [1, 7, 40])
def test_a_search_that_was_killed_goes_on_to_the_same_end(strategy, lines, tmp_path):
    whole = run(strategy, folder=tmp_path / "whole")
    text = (tmp_path / "whole" / "trace.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "trace.jsonl").write_text("".join(text[:lines]) + text[min(lines, len(text) - 1)][:20])
    resumed = run(strategy, folder=tmp_path / "cut", resume=True)
    assert outcome(resumed) == outcome(whole)
    assert json.loads((tmp_path / "cut" / "allocation.json").read_text()) == whole.best.to_dict()


def test_a_finished_search_is_read_back_without_computing_again(tmp_path, monkeypatch):
    whole = run(folder=tmp_path / "s")
    from optimum_dsa.search.objective import Objective

    def never(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(Objective, "loss", never)
    monkeypatch.setattr(Objective, "slopes", never)
    assert outcome(run(folder=tmp_path / "s", resume=True)) == outcome(whole)


def test_a_trace_belongs_to_its_settings(tmp_path):
    run("named", folder=tmp_path / "s")
    with pytest.raises(FileExistsError, match="holds a search already; resume it"):
        run("named", folder=tmp_path / "s")
    with pytest.raises(ValueError, match="was made with strategy='named', not 'ramp'"):
        run("ramp", folder=tmp_path / "s", resume=True)
    (tmp_path / "s" / "trace.jsonl").write_text('{"no": 1}\n')
    with pytest.raises(ValueError, match="no search trace"):
        run("named", folder=tmp_path / "s", resume=True)


def test_a_trace_of_another_search_is_not_gone_on_with(tmp_path):
    run("named", folder=tmp_path / "s", named=["owl", "dlp"])
    with pytest.raises(ValueError, match="Trial 1 of the trace is owl, but this search asks for atp"):
        run("named", folder=tmp_path / "s", named=["atp"], resume=True)


def test_a_trace_that_ends_in_the_middle_of_a_rung_is_gone_on_with_from_there(tmp_path, monkeypatch):
    whole = run("named", folder=tmp_path / "s", named=["owl", "dlp"])
    path = tmp_path / "s" / "trace.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))  # the settings, uniform and owl
    asked = []
    original = Evaluator.answer
    monkeypatch.setattr(
        Evaluator,
        "answer",
        lambda self, requests, first, room: (
            asked.append((len(requests), first)) or original(self, requests, first, room)
        ),
    )
    resumed = run("named", folder=tmp_path / "s", named=["owl", "dlp"], resume=True)
    assert asked[0] == (1, 2) and outcome(resumed) == outcome(whole)
    assert [trial.number for trial in resumed.trace.trials] == list(range(len(resumed.trace.trials)))
    assert resumed.budget.spent_tokens == whole.budget.spent_tokens
