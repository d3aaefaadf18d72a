import json
import os
import re
import subprocess
import sys

import pytest
from optimum.commands.optimum_cli import main
from transformers import AutoTokenizer

from optimum_dsa import (
    DSAPruner,
    demo_model,
)
from optimum_dsa.commands.embedded import DemoRow, story
from optimum_dsa.search.evaluator import Evaluator

from .tiny import tiny_llama


def command(*arguments):
    """`optimum-cli dsa ...` as a user runs it: exit code, output, errors."""
    executable = os.path.join(os.path.dirname(sys.executable), "optimum-cli")
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([executable, "dsa", *arguments], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def run(monkeypatch, capsys, *arguments):
    """The same in this process, for speed."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "dsa", *arguments])
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code or 0
    return code, *capsys.readouterr()


@pytest.mark.contract
def test_prune_then_evaluate(tmp_path, text):
    out = str(tmp_path / "out")
    options = ["--sparsity", "0.6", "--allocation", "owl", "--num-samples", "8", "--sequence-length", "64"]
    code, output, errors = command("prune", str(demo_model()), "-o", out, "--dataset", text, *options)
    assert (code, errors) == (0, "")
    expected, *table = output.splitlines()
    assert re.fullmatch(r"expected: about .* \(an estimate\), memory .* of .*, disk 7.91 MB", expected), expected
    assert [line.split()[0] for line in table[1:11]] == [f"model.layers.{index}" for index in range(10)]
    assert table[12].split()[-2:] == ["0.6000", "0.6000"]
    code, output, errors = command("evaluate", out, "--dataset", text, "--sequence-length", "64", "--json")
    assert (code, errors) == (0, "")
    (result,) = json.loads(output)["models"]
    assert result["sparsity"] == pytest.approx(0.6, abs=1e-6)
    assert result["perplexity"] > 1 and result["windows"] > 8 and result["sequence_length"] == 64


def test_evaluate_as_papers_do_and_of_one_name(monkeypatch, capsys, tmp_path, text):
    arguments = ["evaluate", str(demo_model()), str(demo_model()), "--dataset", text, "--sequence-length", "64"]
    code, output, errors = run(monkeypatch, capsys, *arguments, "--windows", "paper", "--json")
    assert code == 0, errors
    first, second = json.loads(output)["models"]
    assert (first["cut"], first["bos"], first["dtype"]) == ("paper", False, "bfloat16")
    assert [first["model"], second["model"]] == [demo_model().name, f"{demo_model().name} (2)"]
    assert first["fingerprint"] == second["fingerprint"] and len(first["losses"]) == first["windows"]
    options = ["--num-samples", "4", "--output", str(tmp_path / "results.json")]
    code, output, errors = run(monkeypatch, capsys, *arguments, *options)
    assert code == 0, errors
    assert "4 windows of 64 tokens, no BOS, bfloat16" in output and "+0.000 ± 0.000" in output
    assert run(monkeypatch, capsys, *arguments, *options)[0] == 0  # results are replaced by results


def test_options_reach_the_config(monkeypatch, capsys, tmp_path, text):
    out = tmp_path / "out"
    options = (
        "-s 0.5 --method magnitude --allocation atp --spread 0.1 --pattern matrix --update none --granularity matrix "
        "--exclude down_proj --num-samples 4 --sequence-length 32 --no-bos --seed 5 --batch-size 2 --one-pass "
        "--dtype float32 --device cpu --max-shard-size 2MB"
    )
    code, _, errors = run(
        monkeypatch, capsys, "prune", str(demo_model()), "-o", str(out), "--dataset", text, *options.split()
    )
    assert code == 0, errors
    config = json.loads((out / "dsa_config.json").read_text())["config"]
    expected = {
        "sparsity": 0.5, "method": "magnitude", "allocation": "atp", "spread": 0.1, "pattern": "matrix",
        "update": {
            "name": "none", "damping": 0.01, "true_sequential": False, "targets": "sparse", "residual": False,
            "still": [],
        },
        "reconstruct": {"steps": 0, "rate": None, "span": 1, "apart": False, "distill": 0},
        "granularity": "matrix",
        "exclude": ["down_proj"], "batch_size": 2, "sequential": False,
        "data": {"num_samples": 4, "sequence_length": 32, "text_column": "text", "split": None, "subset": None,
                 "image_column": None, "packing": True, "bos": False, "seed": 5},
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert len(list(out.glob("model-*.safetensors"))) > 1
    again = tmp_path / "again"
    code, _, errors = run(
        monkeypatch, capsys, "prune", str(demo_model()), "-o", str(again), "--config", str(out), "-s", "0.4"
    )
    assert code == 0, errors
    assert json.loads((again / "dsa_config.json").read_text())["config"] == {**config, "sparsity": 0.4}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("prune {model} -o {new}", "say how much to remove"),
        ("prune {model} -o {new} -s 0.5 --method wandas", "Did you mean 'wanda'"),
        ("prune {model} -o {new} -s 0.5 --allocation abslog/varr/sin", "Did you mean 'var'"),
        ("prune {model} -o {new} -s 0.5 --pattern 2:4", "nothing to allocate"),
        ("prune {model} -o {new} -s 0.5 --dtype float33", "Unknown dtype 'float33'"),
        ("prune {model} -o {new} -s 0.5 --dtype int8", "Unknown dtype 'int8'"),
        ("prune {model} -o {new} -s 0.5 --device meta", "Device 'meta' holds no weights"),
        ("prune {model} -o {new} -s 0.5 --max-shard-size big", "--max-shard-size is a number of bytes"),
        ("prune {model} -o {new} -s 0.5 --max-shard-size 0GB", "--max-shard-size is a number of bytes"),
        ("recover {model} -o {new} --dataset x --teacher /nope", "No folder /nope, where the teacher would be"),
        ("prune {model} -o {new} -s 0.5 --device cuda:99", "Device 'cuda:99' cannot be used"),
        ("prune {model} -o {new} -s 0.5 --exclude router --dataset {text}", "LlamaForCausalLM is named 'router'"),
        ("prune {model} -o {new} -s 0.5 --dataset {missing}.txt", "missing.txt"),
        ("prune {model} -o {new} -s 0.5 --dataset {empty}", "holds 0 windows"),
        ("prune {model} -o {other} -s 0.5 --dataset {text}", "was not written by optimum-dsa"),
        ("prune {missing} -o {new} -s 0.5 --dataset {text}", "missing"),
        ("prune {model} -o {new} --config {missing}", "missing"),
        ("evaluate {model} --dataset {empty}", "holds 0 windows"),
        ("evaluate {model} --dataset /nope", "No such file or folder: '/nope'"),
        ("evaluate {model} --dataset {text} --tokenizer /nope", "No tokenizer can be loaded from '/nope'"),
        ("evaluate {model} --dataset {text} --bos", "has no beginning-of-sequence token; leave out --bos"),
        ("evaluate {model} --dataset {text} --windows paper --num-samples 3", "the whole text"),
        (
            "evaluate {model} --dataset {text} --sequence-length 1",
            "--sequence-length is a whole number of at least 2, got 1",
        ),
        ("demo -o {other}", "was not written by optimum-dsa"),
    ],
)
def test_bad_usage_is_one_clear_line_and_exit_code_2(monkeypatch, capsys, tmp_path, text, arguments, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    places = {
        "model": demo_model(), "text": text, "new": tmp_path / "new", "other": tmp_path / "other",
        "missing": tmp_path / "missing", "empty": tmp_path / "empty.txt",
    }  # fmt: skip
    code, output, errors = run(monkeypatch, capsys, *[part.format(**places) for part in arguments.split()])
    lines = [line for line in errors.splitlines() if "error:" in line]
    # what a prune will need is said before its text is read
    said = [line for line in output.splitlines() if not line.startswith("expected: ")]
    assert code == 2 and said == [] and len(lines) == 1
    assert message in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "other"]


@pytest.mark.parametrize(
    "arguments",
    [
        "prune {model} -o {new} -s 0.5 --dataset {bad}",
        "search {model} -o {new} -s 0.5 --dataset {bad}",
        "search {model} -o {new} -s 0.5 --dataset {text} --validation {bad}",
        "recover {model} -o {new} --dataset {bad}",
        "recover {model} -o {new} --dataset {text} --validation {bad}",
        "evaluate {model} --dataset {bad}",
    ],
)
@pytest.mark.parametrize("name", ["broken.jsonl", "latin.txt", "plain", "/nope"])
def test_a_text_that_cannot_be_read_is_found_before_the_model_is_loaded(
    monkeypatch, capsys, tmp_path, text, arguments, name
):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "plain").write_text("a text in a file without suffix")
    monkeypatch.setattr(DSAPruner, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    places = {"model": demo_model(), "text": text, "new": tmp_path / "new", "bad": tmp_path / name}
    code, output, errors = run(monkeypatch, capsys, *[part.format(**places) for part in arguments.split()])
    assert code == 2 and output == "" and len(errors.splitlines()) == 1 and name in errors
    assert not (tmp_path / "new").exists()


def test_a_model_without_a_tokenizer_cannot_be_evaluated_on_text(monkeypatch, capsys, tmp_path, text):
    tiny_llama().save_pretrained(tmp_path / "bare")
    code, _, errors = run(monkeypatch, capsys, "evaluate", str(tmp_path / "bare"), "--dataset", text)
    assert code == 2 and "has no tokenizer" in errors


def test_env_prints_versions(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("optimum_dsa.packed.nvcc.cache_folder", lambda: tmp_path)
    _, output, _ = run(monkeypatch, capsys, "env")
    for package in ("optimum-dsa", "torch", "transformers", "gpu"):
        assert f"- {package}: " in output
    table = tmp_path / "table-some-card.json"
    table.write_text('{"one": {"dense": 1.0}}')
    assert f"- measured on cards: 1 kind of product in {table}" in run(monkeypatch, capsys, "env")[1]


def test_the_demo_discovers_an_allocation_that_beats_the_named_ones(tmp_path):
    code, output, errors = command("demo", "-o", str(tmp_path / "out"))
    assert (code, errors) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if len(line.split()) in (3, 4)}
    assert list(rows)[1:6] == ["dense", "uniform", "owl", "dsa", "discovered"]
    found = {name: float(cells[0]) for name, cells in list(rows.items())[1:6]}
    assert found["dense"] < found["discovered"] < min(found["uniform"], found["owl"], found["dsa"])
    assert {cells[1] for name, cells in rows.items() if name in found and name != "dense"} == {"0.6000"}
    assert "lower than owl's" in output and "Try next" in output
    described = json.loads((tmp_path / "out" / "dsa_config.json").read_text())
    assert described["achieved"]["sparsity"] == pytest.approx(0.6, abs=1e-6)


def test_the_demo_does_not_boast():
    rows = [DemoRow("dense", 10.0), DemoRow("uniform", 14.0), DemoRow("owl", 12.0), DemoRow("discovered", 12.0)]
    assert story(rows) == "As many zeros in each; here the search found nothing better than owl."
    assert "25% lower than owl's" in story([*rows[:-1], DemoRow("discovered", 9.0, 0.6, 20.0)])


def test_search_then_prune_with_what_was_found(monkeypatch, capsys, tmp_path, text):
    found = str(tmp_path / "found")
    search = ["search", str(demo_model()), "-o", found, "-s", "0.6", "--dataset", text, "--num-samples", "4"]
    search += ["--sequence-length", "32", "--budget", "2k tokens", "--strategy", "named"]
    code, output, errors = run(monkeypatch, capsys, *search)
    assert code == 0, errors
    assert "validation loss" in output and "uniform" in output
    assert "holds a search already; resume it" in run(monkeypatch, capsys, *search)[2]
    assert run(monkeypatch, capsys, *search, "--resume")[1] == output
    options = ["-s", "0.6", "--allocation", found, "--method", "magnitude"]
    code, _, errors = run(monkeypatch, capsys, "prune", str(demo_model()), "-o", str(tmp_path / "out"), *options)
    assert code == 0, errors
    best = json.loads((tmp_path / "found" / "allocation.json").read_text())
    assert json.loads((tmp_path / "out" / "dsa_config.json").read_text())["allocation"]["sparsity"] == best["sparsity"]


def test_an_interrupted_search_says_what_is_there_and_how_to_go_on(monkeypatch, capsys, tmp_path, text):
    found = tmp_path / "found"
    search = ["search", str(demo_model()), "-o", str(found), "-s", "0.6", "--dataset", text, "--num-samples", "4"]
    search += ["--sequence-length", "32", "--budget", "2k tokens", "--strategy", "named"]
    original = Evaluator.answer

    def interrupt(self, requests, first, room):
        if first:
            raise KeyboardInterrupt
        return original(self, requests, first, room)

    with monkeypatch.context() as patch:
        patch.setattr(DSAPruner, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, errors = run(patch, capsys, *search)
        assert code == 130 and "interrupted, nothing was written" in errors
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "answer", interrupt)
        code, _, errors = run(patch, capsys, *search)
        assert code == 130 and f"what was tried is in {found}; the same command with --resume goes on" in errors
    assert len((found / "trace.jsonl").read_text().splitlines()) > 1
    code, output, errors = run(monkeypatch, capsys, *search, "--resume")
    assert code == 0 and "validation loss" in output, errors


def test_a_search_for_a_pattern_hands_it_on_to_prune(monkeypatch, capsys, tmp_path, text):
    found = str(tmp_path / "found")
    data = ["--dataset", text, "--num-samples", "4", "--sequence-length", "32"]
    search = ["search", str(demo_model()), "-o", found, "-s", "0.5", *data, "--budget", "2k tokens"]
    code, _, errors = run(monkeypatch, capsys, *search, "--pattern", "2:4")
    assert code == 2 and "use --pattern mixed:4" in errors and not (tmp_path / "found").exists()
    code, output, errors = run(monkeypatch, capsys, *search, "--pattern", "mixed:4", "--strategy", "named")
    assert code == 0 and "--sparsity 0.5 --pattern mixed:4 " in output, errors
    assert output.endswith(f"--num-samples 4 --sequence-length 32 --allocation {found}\n")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of two narrow blocks, with a tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tiny_llama(num_hidden_layers=2, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_search_under_an_update_hands_it_on_to_prune(monkeypatch, capsys, tmp_path, text, small):
    found, out = str(tmp_path / "found"), str(tmp_path / "out")
    data = ["--dataset", text, "--num-samples", "4", "--sequence-length", "32"]
    how = ["--method", "alps", "--targets", "dense", "--true-sequential", "--residual"]
    work = ["search", small, "-o", found, "-s", "0.5", *data, *how, "--budget", "200 tokens"]
    for resumed in ([], ["--resume"]):
        code, output, errors = run(monkeypatch, capsys, *work, "--strategy", "curves", *resumed)
        assert code == 0 and "--method alps --true-sequential --targets dense --residual " in output, errors
    code, output, errors = run(monkeypatch, capsys, "prune", small, "-o", out, "-s", "0.5", *data, *how,
                               "--allocation", found)  # fmt: skip
    assert code == 0, errors


def test_the_sensitivity_of_a_model_is_a_picture_and_numbers(monkeypatch, capsys, tmp_path, text, small):
    out = tmp_path / "curves"
    data = ["--dataset", text, "--num-samples", "4", "--sequence-length", "32"]
    code, _, errors = run(monkeypatch, capsys, "report", small, "--sensitivity", *data)
    assert code == 2 and "say where with -o" in errors
    work = ["report", small, "--sensitivity", "--method", "sparsegpt", *data, "-o", str(out), "--json"]
    code, output, errors = run(monkeypatch, capsys, *work)
    assert code == 0, errors
    assert json.loads(output)["levels"][0] == 0.3
    assert {path.name for path in out.iterdir()} >= {"sensitivity.json", "sensitivity.png"}


def test_prune_with_auto_says_what_it_chose(monkeypatch, capsys, tmp_path, text):
    from functools import partial

    from optimum_dsa.search import ready_made
    from optimum_dsa.search.search import search

    monkeypatch.setattr(ready_made, "search", partial(search, named=("owl",)))
    work = ["prune", str(demo_model()), "-o", str(tmp_path / "out"), "-s", "0.5", "--allocation", "auto"]
    work += ["--method", "magnitude", "--dataset", text, "--num-samples", "4", "--sequence-length", "32"]
    code, output, errors = run(monkeypatch, capsys, *work)
    assert code == 0 and "allocations compared by their validation loss" in output, errors
    assert json.loads((tmp_path / "out" / "dsa_config.json").read_text())["config"]["allocation"] in ("owl", "uniform")


@pytest.mark.parametrize(
    "options,message",
    [("--budget much", "expected '2M tokens'"), ("--strategy evolutions", "Did you mean 'evolution'")],
)
def test_a_wrong_search_ends_before_anything_is_written(monkeypatch, capsys, tmp_path, options, message):
    arguments = ["search", str(demo_model()), "-o", str(tmp_path / "found"), "-s", "0.6", *options.split()]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and message in errors and not (tmp_path / "found").exists()


def test_search_over_seeds_compares_them_and_leaves_the_best_for_prune(monkeypatch, capsys, tmp_path, text):
    data = ["-s", "0.6", "--dataset", text, "--num-samples", "4", "--sequence-length", "64"]
    found = str(tmp_path / "found")
    options = ["--strategy", "ramp", "--budget", "3k tokens", "--seeds", "2"]
    code, output, errors = run(monkeypatch, capsys, "search", str(demo_model()), "-o", found, *data, *options)
    assert code == 0, errors
    assert "mean" in output and "standard deviation" in output
    losses = [
        json.loads((tmp_path / "found" / f"seed-{seed}" / "search.json").read_text())["finalists"][0][
            "validation_loss"
        ]
        for seed in (0, 1)
    ]
    best = json.loads((tmp_path / "found" / "search.json").read_text())["finalists"][0]["validation_loss"]
    assert best == min(losses)
    out = tmp_path / "out"
    code, output, errors = run(
        monkeypatch, capsys, "prune", str(demo_model()), "-o", str(out), *data, "--allocation", found
    )
    assert code == 0, errors
    assert "0.6000" in next(line for line in output.splitlines() if line.startswith("prunable weights"))


def test_the_dense_parent_is_asked_for_once_and_feeds_the_report(monkeypatch, capsys, tmp_path, text):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    work = ["-s", "0.5", "--method", "magnitude", "--allocation", "uniform", "-q"]
    assert run(monkeypatch, capsys, "prune", str(demo_model()), "-o", str(out), *work)[0] == 0
    options = ["--dense", str(demo_model()), "--dataset", text, "--sequence-length", "64"]
    options += ["--output", str(out / "evaluation.json"), "--json"]
    first = run(monkeypatch, capsys, "evaluate", str(out), *options)
    monkeypatch.setattr("optimum_dsa.evaluation.kept.results_json", None)  # nothing is measured a second time
    assert run(monkeypatch, capsys, "evaluate", str(out), *options) == first
    dense, pruned = json.loads(first[1])["models"]
    assert dense["sparsity"] < 0.01 < pruned["sparsity"] and dense["perplexity"] < pruned["perplexity"]
    code, output, errors = run(monkeypatch, capsys, "report", str(out), "-o", str(tmp_path / "report"))
    assert (code, errors) == (0, "")
    rows = [line.split() for line in output.splitlines() if "±" in line]
    assert [row[0] for row in rows] == [demo_model().name, "out"] and f"{dense['perplexity']:.2f}" in rows[0]


@pytest.mark.parametrize("folder", ["out", "out/blocks"])
def test_blocks_are_not_kept_where_the_result_goes(folder, monkeypatch, capsys, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    arguments = ["prune", str(demo_model()), "-o", "out", "-s", "0.5", "--dataset", text, "--checkpoints", folder]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "name another folder" in errors and not (tmp_path / "out").exists()
