"""Tasks are measured by lm-eval, offline, on a task made from text that is shipped."""

import json
import re
import sys

import pytest

from optimum_dsa import DSAConfig, DSAPruner, evaluate_tasks
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.common.installation import how_to_install
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.evaluation.comparison import Measured, comparison_table, save_results
from optimum_dsa.evaluation.tasks import task_names, tidy

from ..test_commands import run


YAML = """\
task: next_line
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A YAML file: which of three lines goes on a piece of Python?"""
    folder = tmp_path_factory.mktemp("task")
    lines = [line for line in "\n".join(demo_texts("validation")).splitlines() if len(line.strip()) > 30]
    rows = []
    for number in range(24):
        first = 7 * number
        choices = [lines[first + 2], lines[(first + 90) % 400], lines[(first + 210) % 400]]
        label = number % 3
        choices = choices[3 - label :] + choices[: 3 - label]
        rows.append({"text": "\n".join(lines[first : first + 2]), "choices": choices, "label": label})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "next_line.yaml").write_text(YAML.format(data=folder / "rows.jsonl"))
    return folder / "next_line.yaml"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "magnitude"
    pruner = DSAPruner.from_pretrained(demo_model())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(folder)
    return folder


def test_the_commands_numbers_are_those_of_lm_eval(monkeypatch, capsys, tmp_path, task, pruned):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    output = tmp_path / "results.json"
    options = ["--tasks", str(task), "--batch-size", "4", "--output", str(output)]
    code, printed, errors = run(monkeypatch, capsys, "evaluate", str(demo_model()), str(pruned), *options)
    assert code == 0, errors
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(pruned)},
        tasks=["next_line"],
        task_manager=TaskManager(include_path=str(task.parent), include_defaults=False),
        batch_size=4,
        device="cpu",
    )["results"]["next_line"]
    dense, sparse = json.loads(output.read_text())["models"]
    for metric in ("acc", "acc_norm"):
        found = sparse["tasks"]["next_line"][metric]
        assert found == {"value": expected[f"{metric},none"], "error": expected[f"{metric}_stderr,none"]}
    assert dense["sparsity"] < 0.01 and sparse["sparsity"] == pytest.approx(0.6, abs=1e-4)
    head, *lines = printed.splitlines()
    assert head.split() == ["model", "sparsity", "next_line", "(acc_norm)"] and len(lines) == 2
    assert f"{expected['acc_norm,none']:.4f} ± {expected['acc_norm_stderr,none']:.4f}" in lines[1]


def test_one_model_with_text_and_tasks(monkeypatch, capsys, tmp_path, task):
    pytest.importorskip("lm_eval")
    (tmp_path / "text.txt").write_text("\n".join(demo_texts("calibration"))[:8_000])
    options = ["--tasks", "next_line", "--include-path", str(task.parent), "--limit", "5"]
    options += ["--dataset", str(tmp_path / "text.txt"), "--sequence-length", "64"]
    code, printed, errors = run(monkeypatch, capsys, "evaluate", str(demo_model()), *options)
    assert code == 0, errors
    assert [line.split()[0] for line in printed.splitlines()] == ["perplexity", "next_line", "next_line", "sparsity"]
    code, printed, _ = run(monkeypatch, capsys, "evaluate", str(demo_model()), *options, "--json")
    found = json.loads(printed)
    assert found["tasks"]["next_line"]["acc"]["value"] * 5 % 1 == pytest.approx(0)
    assert found["perplexity_error"] > 0 and found["dataset"] == "text.txt"


def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, tmp_path, task):
    assert "say what to measure" in run(monkeypatch, capsys, "evaluate", str(demo_model()))[2]
    (tmp_path / "nameless.yaml").write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match="nameless.yaml describes no task"):
        task_names([str(tmp_path / "nameless.yaml")])
    pruner = DSAPruner.from_pretrained(demo_model())
    with pytest.raises(ValueError, match="need the model's tokenizer"):
        evaluate_tasks(pruner.model, None, ["boolq"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=re.escape(how_to_install("eval"))):
        evaluate_tasks(pruner.model, pruner.tokenizer, ["boolq"])


def test_an_unknown_task_is_answered_with_near_ones(monkeypatch, task):
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=str(task.parent), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: manager)  # reading lm-eval's own takes 20 seconds
    pruner = DSAPruner.from_pretrained(demo_model())
    with pytest.raises(UnknownNameError, match="lm-eval has no task 'next_lime'. Did you mean 'next_line'"):
        evaluate_tasks(pruner.model, pruner.tokenizer, ["next_lime"])


def test_errors_stand_beside_their_values():
    results = {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.1,
            "bleu,none": 3,
            "bleu_stderr,none": "N/A",
        }
    }
    assert tidy(results) == {
        "gsm8k": {
            "exact_match (strict-match)": {"value": 0.25, "error": 0.1},
            "bleu": {"value": 3.0, "error": None},
        }
    }


def test_a_table_shows_what_there_is(tmp_path):
    score = {"acc": {"value": 0.5, "error": 0.01}}
    results = [
        Measured("dense", 0.0, 100, 10.0, 0.25, {"dataset": "x", "windows": 3}, {"a": score, "b": score}),
        Measured("pruned", 0.5, 100, tasks={"a": score}),
    ]
    head, dense, pruned = comparison_table(results).splitlines()
    assert head.split() == ["model", "sparsity", "perplexity", "a", "(acc)", "b", "(acc)", "mean"]
    assert "10.000 ± 0.250" in dense and dense.endswith("0.5000")
    assert pruned.split() == ["pruned", "0.5000", "0.5000", "±", "0.0100"]
    save_results(tmp_path / "folder" / "results.json", results)
    saved = json.loads((tmp_path / "folder" / "results.json").read_text())
    assert saved["models"][0]["windows"] == 3 and "perplexity" not in saved["models"][1]
    assert "optimum-dsa" in saved["versions"]
