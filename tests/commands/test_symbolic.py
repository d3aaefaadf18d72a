"""`--metric` with an expression, and searches that find one, from the command line."""

import json
import shlex

import pytest
from transformers import AutoTokenizer

from optimum_dsa import DSAPruner, demo_model, demo_texts

from ..test_commands import run
from ..tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of two narrow blocks, with a tokenizer; and a text, in its folder."""
    folder = tmp_path_factory.mktemp("narrow")
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tiny_llama(num_hidden_layers=2, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(demo_texts("calibration")))
    return folder


def options(model):
    return ["-s", "0.6", "--dataset", str(model / "text.txt"), "--num-samples", "4", "--sequence-length", "32"]


def test_what_a_search_found_is_pruned_with_by_the_line_that_it_ends_with(monkeypatch, capsys, tmp_path, model):
    """Metric and allocation both, and by --metric another one; the model says which."""
    found, out = tmp_path / "found", tmp_path / "out"
    work = ["search", str(model), "-o", str(found), *options(model), "--strategy", "joint", "--budget", "2k tokens"]
    code, output, errors = run(monkeypatch, capsys, *work)
    assert code == 0, errors
    file = found / "allocation.json"
    metric = json.loads(file.read_text()).get("metric")
    assert metric == json.loads((found / "search.json").read_text())["finalists"][0]["candidate"].get("metric")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metric": "mul(square(W), X)"}))
    line = next(line for line in output.splitlines() if "next:" in line)
    prune = shlex.split(line.partition("dsa ")[2].replace("-o OUT", f"-o {out}"))
    assert run(monkeypatch, capsys, *prune)[0] == 0
    assert DSAPruner.from_pretrained(out).report.config.metric == "mul(square(W), X)"
    assert run(monkeypatch, capsys, *prune, "--metric", "sqrt(W)")[0] == 0
    assert json.loads((out / "dsa_config.json").read_text())["config"]["metric"] == "sqrt(W)"
    assert run(monkeypatch, capsys, "verify", str(out))[0] == 0


@pytest.mark.parametrize(
    "work, message",
    [
        ("prune --metric abs(w)", "A metric has no 'w'"),
        ("prune --metric import('os')", "A metric has no 'import'"),
        ("search --at owl", "--at is of strategy symbolic, and 'auto' looks for an allocation"),
        ("search --strategy symbolic --method alps", "chooses itself what goes"),
        ("search --strategy symbolic --at owll", "Did you mean 'owl'"),
        ("search --strategy joint --structures ffn", "is of single weights"),
    ],
)
def test_wrong_metrics_end_before_any_work(work, message, monkeypatch, capsys, tmp_path, model):
    command, *how = work.split()
    arguments = [command, str(model), "-o", str(tmp_path / "out"), *options(model), *how]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and message in errors, errors
    assert not (tmp_path / "out").exists()
