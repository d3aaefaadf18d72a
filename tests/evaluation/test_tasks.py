"""Tasks are measured by lm-eval, offline, on a task made from text that is shipped."""

import importlib.metadata
import json
import re
import sys
from functools import partial

import pytest

from optimum_dsa import DSAConfig, DSAPruner, Measurement, comparison_table, evaluate_tasks
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.common.installation import how_to_install
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.evaluation.tasks import ZERO_SHOT, find_tasks, tidy

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
    how, head, *lines = printed.splitlines()
    assert how == "tasks: all questions, each task's own examples, at most 512 tokens, bfloat16"
    assert head.split() == ["model", "sparsity", "next_line", "(acc_norm)"] and len(lines) == 2
    assert f"{expected['acc_norm,none']:.4f} ± {expected['acc_norm_stderr,none']:.4f}" in lines[1]


def test_one_model_with_text_and_tasks(monkeypatch, capsys, tmp_path, task):
    pytest.importorskip("lm_eval")
    (tmp_path / "text.txt").write_text("\n".join(demo_texts("calibration"))[:8_000])
    options = ["--tasks", "next_line", "--include-path", str(task.parent), "--limit", "5"]
    options += ["--dataset", str(tmp_path / "text.txt"), "--sequence-length", "64"]
    code, printed, errors = run(monkeypatch, capsys, "evaluate", str(demo_model()), *options)
    assert code == 0, errors
    parts = [line.split()[0] for line in printed.splitlines()]
    assert parts == ["perplexity", "next_line", "next_line", "tasks", "sparsity"]
    code, printed, errors = run(monkeypatch, capsys, "evaluate", str(demo_model()), *options, "--json", "-q")
    assert errors == ""  # neither lm-eval's bars nor its warnings
    (found,) = json.loads(printed)["models"]
    assert found["tasks"]["next_line"]["acc"]["value"] * 5 % 1 == pytest.approx(0)
    assert found["perplexity_error"] > 0 and found["dataset"] == "text.txt"
    assert found["task_protocol"] == {
        "limit": 5, "sequence_length": 64, "dtype": "bfloat16", "lm_eval": importlib.metadata.version("lm_eval"),
    }  # fmt: skip


def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, tmp_path, task):
    assert "say what to measure" in run(monkeypatch, capsys, "evaluate", str(demo_model()))[2]
    (tmp_path / "nameless.yaml").write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match="nameless.yaml describes no task"):
        find_tasks([str(tmp_path / "nameless.yaml")])
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
    with pytest.raises(UnknownNameError, match=f"no task 'next_lime', nor has {task.parent}. Did you mean"):
        find_tasks(["next_lime"], task.parent)


def test_tasks_are_looked_for_before_a_model_is_loaded(monkeypatch, capsys, tmp_path, task):
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=str(task.parent), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: manager)
    monkeypatch.setattr(DSAPruner, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    code, printed, errors = run(monkeypatch, capsys, "evaluate", str(demo_model()), "--tasks", "nosuch")
    assert code == 2 and printed == "" and errors.splitlines()[-1].count("lm-eval has no task 'nosuch'") == 1
    with pytest.raises(ValueError, match="No task is named"):
        find_tasks([])
    with pytest.raises(FileNotFoundError, match="No such folder of tasks"):
        find_tasks(["next_line"], tmp_path / "nowhere")


@pytest.fixture
def folder(task, tmp_path):
    """Task files as people write them, beside each other."""
    pytest.importorskip("lm_eval")
    base = "\n".join(line for line in task.read_text().splitlines() if not line.startswith("task:"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(base)
    (tmp_path / "shared" / "named.yaml").write_text(f"task: from_include\n{base}")
    files = {
        "one.yaml": 'task: "one" # a comment\ninclude: shared/base.yaml\n',
        "two.yaml": "include: shared/base.yaml\n'task': two\ntag: ours\n",
        "inner.yaml": "include: shared/named.yaml\n",
        "group.yaml": "group: mine\ntask:\n  - one\n  - two\naggregate_metric_list:\n  - metric: acc\n",
        "nested.yaml": "group: all_of_mine\ntask:\n  - {group: part, task: [one]}\n  - {task: two, num_fewshot: 0}\n",
        "broken.yaml": "task: [\n",
        "lost.yaml": "task: lost\ninclude: shared/nowhere.yaml\n",
        "twin.yaml": "task: one\ninclude: shared/base.yaml\n",
        "other.yml": "task: other\ninclude: shared/base.yaml\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "shared" / "named.yaml").rename(tmp_path / "shared" / "named.yaml.inc")
    (tmp_path / "inner.yaml").write_text("include: shared/named.yaml.inc\n")
    return tmp_path


@pytest.mark.parametrize(
    "asked,names",
    [
        (["group.yaml"], ("mine",)),
        (["nested.yaml"], ("all_of_mine",)),
        (["inner.yaml"], ("from_include",)),
        (["one.yaml", "two.yaml"], ("one", "two")),
        (["one.yaml", "ours"], ("one", "ours")),
        (["two.yaml", "*e"], ("two", "all_of_mine", "from_include", "mine", "one")),
    ],
)
def test_files_are_what_lm_evals_own_index_reads_in_them(folder, asked, names):
    from lm_eval.tasks import TaskManager

    given = [str(folder / name) if name.endswith("yaml") else name for name in asked]
    found = find_tasks(given)
    assert found.names == names
    own = TaskManager(include_path=str(folder), include_defaults=False)
    assert {*found.manager.all_tasks} == {*own.all_tasks}  # its own 10,000 are not read for it


@pytest.mark.parametrize(
    "name,message",
    [
        ("broken.yaml", "broken.yaml describes no task: "),
        ("lost.yaml", "lost.yaml describes no task: .*nowhere.yaml"),
        ("twin.yaml", "twin.yaml describes 'one', and so does another file"),
        ("other.yml", "lm-eval reads files that end in .yaml"),
        ("missing.yaml", "No such file of a task: .*missing.yaml"),
        ("shared/base.yaml", "base.yaml describes no task: "),
    ],
)
def test_a_file_that_lm_eval_would_pass_over_is_refused(folder, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        find_tasks([str(folder / name)])
    assert "\n" not in str(raised.value)


def test_a_file_in_the_folder_of_tasks_that_cannot_be_read_is_named(folder, caplog, monkeypatch):
    from lm_eval import tasks

    monkeypatch.setattr(
        tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False)
    )  # its own take seconds
    assert find_tasks(["one"], folder).names == ("one",)
    said = [record.getMessage() for record in caplog.records if record.name == "optimum_dsa.evaluation.tasks"]
    # shared/base.yaml is a template, which is no task and no damage
    assert len(said) == 2 and "broken.yaml cannot be read" in said[0] and "lost.yaml cannot be read" in said[1]
    with pytest.raises(UnknownNameError, match="no task 'lost'.*lost.yaml cannot be read: .*nowhere.yaml"):
        find_tasks(["lost"], folder)


@pytest.mark.parametrize(
    "tasks", ["[one, nowhere]", "[{group: part, task: [nowhere]}]", "[{group: part, task: [one, nowhere]}]"]
)
def test_what_a_group_names_is_there_before_a_model_is_loaded(folder, tmp_path, tasks):
    (tmp_path / "group.yaml").write_text(f"group: mine_too\ntask: {tasks}\n")
    with pytest.raises(UnknownNameError, match="no task 'nowhere', which a group names"):
        find_tasks([str(tmp_path / "group.yaml")], folder)


def test_a_group_is_measured_and_a_model_on_the_disk_as_one_in_memory(folder, pruned, tmp_path):
    loaded = [DSAPruner.from_pretrained(pruned, dtype="float32"),
              DSAPruner.from_pretrained(pruned, dtype="float32", device_map={"": "disk"},
                                        offload_folder=str(tmp_path / "offload"))]  # fmt: skip
    memory, disk = (
        evaluate_tasks(one.model, one.tokenizer, [str(folder / "group.yaml")], limit=2, sequence_length=64)
        for one in loaded
    )
    assert {*memory} == {"mine", "one", "two"} and memory["one"]["acc"]["value"] in (0.0, 0.5, 1.0)
    assert disk == memory


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


@pytest.fixture(scope="module")
def copies(task, tmp_path_factory):
    """The seven tasks as a folder of copies whose data are named from the folder around it."""
    pytest.importorskip("lm_eval")
    around = tmp_path_factory.mktemp("copies")
    (around / "data").mkdir()
    (around / "data" / "rows.jsonl").write_text((task.parent / "rows.jsonl").read_text())
    (around / "tasks").mkdir()
    text = re.sub("test: .*", "test: data/rows.jsonl", task.read_text())
    for name in ZERO_SHOT:
        (around / "tasks" / f"{name}.yaml").write_text(text.replace("task: next_line", f"task: local_{name}"))
    return around / "tasks"


def test_zero_shot_is_the_seven_tasks_and_the_mean_of_their_accuracies(monkeypatch, capsys, copies, pruned):
    options = ["--tasks", "zero-shot", "--tasks-path", str(copies), "--limit", "4", "--batch-size", "auto"]
    code, printed, errors = run(monkeypatch, capsys, "evaluate", str(demo_model()), str(pruned), *options, "--json")
    assert code == 0, errors
    dense, sparse = json.loads(printed)["models"]
    assert dense["groups"] == {"zero-shot": [f"local_{name}" for name in ZERO_SHOT]}
    for model in (dense, sparse):
        seven = [model["tasks"][f"local_{name}"]["acc"] for name in ZERO_SHOT]
        mean = model["tasks"]["zero-shot"]["acc"]
        assert mean["value"] == pytest.approx(sum(one["value"] for one in seven) / 7)
        assert mean["error"] == pytest.approx(sum(one["error"] ** 2 for one in seven) ** 0.5 / 7)
    shown = comparison_table([Measurement.from_dict(model) for model in (dense, sparse)])
    heads = re.split(" {2,}", shown.splitlines()[1])
    assert heads == ["model", "sparsity", *(f"local_{name} (acc)" for name in ZERO_SHOT), "zero-shot (acc)"]


def test_a_name_is_its_copys_where_a_folder_has_one(copies, tmp_path):
    assert find_tasks(["rte", "local_boolq"], copies).names == ("local_rte", "local_boolq")
    (tmp_path / "rte.yaml").write_text((copies / "rte.yaml").read_text().replace("local_rte", "rte"))
    assert find_tasks(["rte"], tmp_path).names == ("rte",)


def test_data_that_are_not_there_are_missed_before_a_model_is_loaded(monkeypatch, capsys, copies, tmp_path):
    (tmp_path / "rte.yaml").write_text((copies / "rte.yaml").read_text())
    monkeypatch.setattr(DSAPruner, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    options = ["--tasks", "rte", "--tasks-path", str(tmp_path)]
    code, _, errors = run(monkeypatch, capsys, "evaluate", str(demo_model()), *options)
    assert code == 2 and "The data of local_rte are not to be had" in errors.splitlines()[-1]


def test_requests_are_made_once_for_several_models(monkeypatch, copies, pruned):
    from lm_eval.api.task import ConfigurableTask

    made = []
    own = ConfigurableTask.fewshot_context
    monkeypatch.setattr(ConfigurableTask, "fewshot_context", lambda *a, **k: made.append(1) or own(*a, **k))
    pruner, tasks = DSAPruner.from_pretrained(pruned), find_tasks(["rte"], copies)
    first, second = (evaluate_tasks(pruner.model, pruner.tokenizer, tasks, keep=True) for _ in range(2))
    assert first == second and len(made) == 24  # questions
    evaluate_tasks(pruner.model, pruner.tokenizer, tasks)
    assert len(made) == 48
