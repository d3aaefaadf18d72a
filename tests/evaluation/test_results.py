import json

import pytest

from optimum_dsa import Measurement, Protocol
from optimum_dsa.evaluation.measurement import TaskProtocol
from optimum_dsa.evaluation.results import read_results, results_from, results_json, save_results


SCORE = {"acc": {"value": 0.5, "error": 0.01}, "bleu": {"value": 3.0, "error": None}}
TEXT = Protocol("test.txt", 3, 64, "paper", True, "float32", "0123456789abcdef")
FULL = Measurement(
    "pruned", 0.5, 100, 10.0, 0.25, TEXT, (2.0, 2.25, 2.5), {"a": SCORE}, TaskProtocol(limit=5, dtype="float32")
)


def test_what_is_written_is_read_again(tmp_path):
    results = [FULL, Measurement("dense", 0.0, 100)]
    save_results(tmp_path / "folder" / "results.json", results)
    assert read_results(tmp_path / "folder" / "results.json") == results
    assert results_from(json.loads(results_json(results))) == results
    saved = json.loads((tmp_path / "folder" / "results.json").read_text())
    first, second = saved["models"]
    assert (first["dataset"], first["windows"], first["sequence_length"]) == ("test.txt", 3, 64)
    assert second == {"model": "dense", "sparsity": 0.0, "size": 100}
    assert "optimum-dsa" in saved["versions"]


def test_what_the_first_version_wrote_is_read_and_is_of_no_known_cut():
    row = {"model": "out", "sparsity": 0.5, "size": 100, "perplexity": 9.5, "perplexity_error": 0.5}
    row |= {"dataset": "test.txt", "windows": 3, "sequence_length": 64}
    for data in (row, [row], {"models": [row], "versions": {"torch": "2"}}):
        (found,) = results_from(data)
        assert (found.model, found.perplexity, found.losses) == ("out", 9.5, ())
        assert found.protocol == Protocol("test.txt", 3, 64)
        assert str(found.protocol) == "test.txt, 3 windows of 64 tokens"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model": 3}, "model is a str"),
        ({"size": 1.5}, "size is a int"),
        ({"perplexity": "low"}, "perplexity is a float, got 'low'"),
        ({"windows": -1}, "windows is a int"),
        ({"bos": "yes"}, "bos is a bool"),
        ({"losses": [1, "2"]}, "losses is a list of numbers"),
        ({"tasks": {"a": {"acc": 0.5}}}, "tasks is task -> metric -> value and error"),
        ({"task_protocol": []}, "task_protocol is an object"),
    ],
)
def test_what_no_measurement_can_be_is_refused(tmp_path, change, message):
    (tmp_path / "results.json").write_text(json.dumps({"models": [{**FULL.to_dict(), **change}]}))
    with pytest.raises(ValueError, match=f"results.json holds no measurements: {message}"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize("data", [[], {}, 3, "x", {"models": []}, {"models": [3]}, {"model": "x"}])
def test_other_content_is_no_measurement(data):
    with pytest.raises(ValueError):
        results_from(data)


def test_a_file_that_holds_something_else_is_not_replaced(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds no results"):
        save_results(tmp_path / "mine.json", [FULL])


def test_a_measurement_says_by_which_protocol():
    assert str(FULL).splitlines() == [
        "perplexity  10.000 ± 0.250  on test.txt, 3 windows of 64 tokens, one BOS before the whole text, cut as in "
        "papers, float32",
        "a  acc 0.5000 ± 0.0100",
        "a  bleu 3.0000",
        "tasks       the first 5 questions, each task's own examples, float32",
        "sparsity    0.5000  of 100 prunable weights",
    ]
