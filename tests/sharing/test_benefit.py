"""What a model gives, as it was measured: on the page, in the terminal and in the card; nothing where nothing was."""

import json

import pytest

from optimum_dsa import DSAConfig, DSAPruner, measure_speed, save_speed, write_report
from optimum_dsa.sharing.benefit import benefits
from optimum_dsa.sharing.outcome import Outcome
from optimum_dsa.sharing.page import figures, page

from ..tiny import tiny_llama
from .common import card, push


@pytest.fixture
def folder(tmp_path):
    """A pruned model that was measured beside the dense one."""
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture(scope="module")
def speed():
    patch = pytest.MonkeyPatch()
    patch.setattr("optimum_dsa.evaluation.reading.PROBE", 2**16)
    patch.setattr("optimum_dsa.evaluation.reading._CACHE", 2**16)
    found = measure_speed({"home/mine": tiny_llama(), "home/dense": tiny_llama}, prompt=8, new_tokens=2, rounds=1)
    patch.undo()
    return found


def test_report_and_card_show_what_was_measured(hub, folder, speed):
    save_speed(folder / "speed.json", speed)
    first, other = speed.speeds.values()
    ratio = f"{first.decode / other.decode:.2f}"
    said = write_report(folder)
    assert f"What it gives. Measured: {speed.how}. On {speed.where}." in said
    assert next(line for line in said.splitlines() if "decode, tokens/s" in line).split()[-1] == ratio
    outcome = Outcome.read(folder)
    shown = page([outcome], figures([outcome]))
    assert f"{ratio} ×" in shown and speed.machine in shown and speed.date in shown and "resident memory" in shown
    push(folder)
    text = card(hub).text
    assert "## Memory and speed" in text and "| decode, tokens/s |" in text and speed.machine in text
    assert "| – | tiny | dense | ratio |" in text.replace("|  |", "| – |") and "home/" not in text
    assert "speed.json" not in hub.content("me/tiny")


def test_where_nothing_was_measured_there_is_no_section(hub, folder, speed):
    other = {**speed.to_dict()}
    other["speeds"] = {"mine": {**other["speeds"]["home/mine"], "parameters": 7}}
    (folder / "of_another.json").write_text(json.dumps(other))
    (folder / "broken.json").write_text('{"speeds": {"mine": {"decode": "fast"}}}')
    outcome = Outcome.read(folder)
    assert outcome.speed is None
    assert "What it gives" not in write_report(folder) and "Writes" not in page([outcome], figures([outcome]))
    push(folder)
    assert "Memory and speed" not in card(hub).text


def test_the_latest_measurement_counts_and_one_alone_has_no_ratio(folder, speed):
    for date, file in (("2026-02-01", "a.json"), ("2026-01-01", "b.json")):
        data = {**speed.to_dict(), "date": date}
        data["speeds"] = {"home/mine": data["speeds"]["home/mine"]}
        (folder / file).write_text(json.dumps(data))
    outcome = Outcome.read(folder)
    assert outcome.speed.date == "2026-02-01"
    said = write_report(folder)
    assert "decode, tokens/s" in said and "ratio" not in said and "Writes" not in page([outcome], figures([outcome]))


def test_forms_of_one_model_are_told_apart(folder, speed):
    data = speed.to_dict()
    row = data["speeds"]["home/mine"]
    data["speeds"] = {
        "p": {**row, "form": "packed"}, "d": {**row, "form": "dense"}, "o": {**row, "model": "home/dense"}
    }  # fmt: skip
    (folder / "speed.json").write_text(json.dumps(data))
    (found,) = benefits([Outcome.read(folder)])
    assert found[2] == ["", "mine (packed)", "mine (dense)", "dense"]
    assert [row[0] for row in found[3]][-1] == "decode, times the last"


def test_a_stranger_s_names_are_no_markup(hub, folder, speed):
    data = {**speed.to_dict(), "machine": "<b>chip</b> | [x](http://y)\n## more", "date": "\x1b[2J"}
    (folder / "speed.json").write_text(json.dumps(data))
    outcome = Outcome.read(folder)
    shown = page([outcome], figures([outcome]))
    assert "<b>chip" not in shown and "\x1b" not in shown and "\x1b" not in write_report(folder)
    push(folder)
    text = card(hub).text
    assert "\n## more" not in text and "`<b>chip</b>`" in text and "\x1b" not in text
