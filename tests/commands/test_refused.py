"""A prune that the model refuses leaves nothing that hinders the next."""

from pathlib import Path

import pytest

from optimum_dsa import DSAPruner, demo_model
from optimum_dsa.model.stacks import UnprunableError

from ..test_commands import run


def test_blocks_of_a_refused_run_do_not_have_to_be_resumed(monkeypatch, capsys, tmp_path):
    def refused(self, source, config, checkpoints, resume):
        Path(checkpoints).mkdir(parents=True, exist_ok=True)
        Path(checkpoints, "block-00000.safetensors").write_bytes(b"x")
        raise UnprunableError("this weight cannot be pruned")

    monkeypatch.setattr(DSAPruner, "prune", refused)
    options = ["-s", "0.5", "--method", "magnitude", "--allocation", "uniform"]
    for _ in range(2):
        code, _, errors = run(monkeypatch, capsys, "prune", str(demo_model()), "-o", str(tmp_path / "out"), *options)
        assert code == 2 and "this weight cannot be pruned" in errors
    assert [*tmp_path.iterdir()] == []


def test_part_of_an_options_name_is_not_taken_for_another_option(monkeypatch, capsys):
    for command, option in (("search", "--allocation"), ("plan", "--structures"), ("prune", "--sparsit")):
        code, _, errors = run(monkeypatch, capsys, command, str(demo_model()), "-o", "out", "-s", "0.5", option, "owl")
        assert code == 2 and f"dsa {command}: error: unrecognized arguments: {option} owl" in errors


def test_a_model_that_is_missing_is_told_before_others_are_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(DSAPruner, "measure", lambda *_, **__: 1 / 0)
    models, text = (str(demo_model()), "nobody/nothing"), str(tmp_path / "test.txt")
    Path(text).write_text("Something to read. " * 100)
    code, _, errors = run(monkeypatch, capsys, "evaluate", *models, "--dataset", text)
    assert code == 2 and "nobody/nothing" in errors


def test_a_folder_that_holds_no_allocation_yet_is_named_with_a_way_out(monkeypatch, capsys, tmp_path):
    (tmp_path / "trace.jsonl").touch()
    options = ["-o", str(tmp_path / "out"), "-s", "0.5", "--method", "magnitude", "--allocation", str(tmp_path)]
    code, _, errors = run(monkeypatch, capsys, "prune", str(demo_model()), *options)
    assert code == 2 and "neither allocation.json nor dsa_config.json" in errors and "--resume" in errors


@pytest.mark.parametrize(
    "options,message",
    [
        ("--dataset test.txt --limit 3", "--limit 3 is of --tasks, which was not given"),
        ("--dataset test.txt --tasks-path tasks", "--tasks-path tasks is of --tasks"),
        ("--dataset test.txt --num-fewshot 0", "--num-fewshot 0 is of --tasks"),
        ("--tasks boolq --num-samples 3", "--num-samples 3 is of --dataset, which was not given"),
        ("--tasks boolq --windows paper", "--windows paper is of --dataset"),
    ],
)
def test_an_option_of_what_is_not_measured_is_refused(options, message, monkeypatch, capsys):
    code, _, errors = run(monkeypatch, capsys, "evaluate", "nowhere", *options.split())
    assert code == 2 and message in errors and len(errors.splitlines()) == 1
