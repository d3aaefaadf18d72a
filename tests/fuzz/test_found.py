"""What the readers once stumbled over, each as small as it can be."""

import json

import pytest

from optimum_dsa import Allocation, DSAConfig
from optimum_dsa.checkpoint.description import read_description, report_from
from optimum_dsa.common.files import DEEPEST_JSON, parse_json
from optimum_dsa.common.schema import violations
from optimum_dsa.pruning.configuration import CONFIG_NAME
from optimum_dsa.search.problem import parse_budget
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import SearchTrace, Trial
from optimum_dsa.sharing.outcome import Outcome

from . import NAMED
from .targets import pruned, searched


@pytest.mark.parametrize(
    "data",
    [
        [], 7, "x", None, {"sparsity": {"a": 0.5}, "sizes": 3}, {"sparsity": {"a": 0.5}, "sizes": {"a": 10**400}},
        {"sparsity": {"a": 0.5}, "sizes": {"a": []}}, {"sparsity": {"a": 0.5}, "sizes": {"a": -1}},
        {"sparsity": {"a": 0.5}, "sizes": {"a": True}}, {"sparsity": {"a": 10**5000}},
        {"sparsity": {"a": 1}, "name": []},
    ],
    ids=range(11),
)  # fmt: skip
def test_an_allocation_of_other_things_than_numbers(data):
    with pytest.raises(ValueError, match="llocation"):
        Allocation.from_dict(data)


@pytest.mark.parametrize("name", ["sparsity", "spread", "damping", "max_sparsity"])
def test_a_config_of_numbers_that_no_float_holds(name):
    with pytest.raises(ValueError, match=name):
        DSAConfig.from_dict({"sparsity": 0.5, name: 10**400})


def test_a_schema_of_numbers_that_no_float_holds():
    assert list(violations(10**400, {"type": "number"}))
    assert list(violations(10**400, {"type": "integer", "maximum": 5}))
    assert not list(violations(10**400, {"type": "integer", "minimum": 5}))


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900])
def test_json_that_its_parser_reads_and_nothing_else_can(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_as_deep_as_allowed():
    assert parse_json("[" * DEEPEST_JSON + "]" * DEEPEST_JSON)
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * (DEEPEST_JSON + 1) + "]" * (DEEPEST_JSON + 1))


def test_units_that_only_one_side_has(tmp_path):
    data = json.loads((pruned() / CONFIG_NAME).read_text())
    units = data["achieved"]["units"]
    units["other"] = units.pop(next(iter(units)))
    (tmp_path / CONFIG_NAME).write_text(json.dumps(data))
    with pytest.raises(ValueError, match="given for different units"):
        report_from(read_description(tmp_path))


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 400, "1e400", "1.2.3", ".", "9" * 20 + "M"])
def test_a_budget_beyond_all_numbers(text):
    with pytest.raises(ValueError, match="Cannot read the budget"):
        parse_budget(text)


@pytest.mark.parametrize(
    "data",
    [
        7, [], "x", {"function": []}, {"function": {}}, {"spread": "wide"}, {"spread": 10**400}, {"granularity": []},
        {"offsets": 3}, {"offsets": {"q": "x"}}, {"counts": 3}, {"counts": [[]]}, {"counts": [-1]},
    ],
    ids=range(13),
)  # fmt: skip
def test_a_candidate_of_other_things(data):
    with pytest.raises(ValueError, match="candidate"):
        Candidate.from_dict(data)


@pytest.mark.parametrize(
    "name,value",
    [
        ("rows", [0, "x"]), ("rows", [2, 1]), ("rows", [1]), ("rows", {}), ("loss", "low"), ("loss", {}),
        ("tokens", []),
        ("tokens", -1), ("seconds", "long"), ("counts", 3), ("counts", [{}]), ("slopes", ["x"]), ("kind", []),
        ("candidate", 7), ("error", []), ("loss", 10**400), ("number", 1.5),
    ],
)  # fmt: skip
def test_a_trial_of_other_things(tmp_path, name, value):
    lines = (searched() / "trace.jsonl").read_text().splitlines()
    trial = {**json.loads(lines[1]), name: value}
    with pytest.raises(ValueError):
        Trial.from_json(json.dumps(trial))
    (tmp_path / "trace.jsonl").write_text("\n".join([lines[0], json.dumps(trial), ""]))
    with pytest.raises(ValueError, match="is no search trace"):
        SearchTrace.load(tmp_path / "trace.jsonl")


@pytest.mark.parametrize("line", ['{"settings": 3}', "[1]", "[" * 100_000])
def test_a_trace_without_settings(tmp_path, line):
    (tmp_path / "trace.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match="is no search trace"):
        SearchTrace.load(tmp_path / "trace.jsonl")


@pytest.mark.parametrize("config", [[], 7, "x", {"sparsity": []}, {"sparsity": {}}, {}])
def test_a_search_under_way_with_other_settings(tmp_path, config):
    lines = (searched() / "trace.jsonl").read_text().splitlines()
    settings = {"settings": {**json.loads(lines[0])["settings"], "config": config}}
    (tmp_path / "trace.jsonl").write_text("\n".join([json.dumps(settings), *lines[1:], ""]))
    with pytest.raises(ValueError, match="trace.jsonl: config"):
        Outcome.read(tmp_path)


@pytest.mark.parametrize(
    "name,value", [("baselines", 3), ("baselines", {"x": 3}), ("trials", "many"), ("tokens", []), ("tokens", 10**400)]
)
def test_a_search_of_other_things(tmp_path, name, value):
    for path in searched().glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    facts = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps({**facts, name: value}))
    with pytest.raises(NAMED):
        Outcome.read(tmp_path)


@pytest.mark.parametrize("value", ["low", [], {}, 10**400])
def test_a_finalist_of_other_things(tmp_path, value):
    for path in searched().glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    facts = json.loads((tmp_path / "search.json").read_text())
    facts["finalists"][0]["proxy_loss"] = value
    (tmp_path / "search.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="proxy_loss is a float"):
        Outcome.read(tmp_path)


@pytest.mark.parametrize(
    "name,value", [("windows", []), ("sequence_length", "x"), ("perplexity", 10**400), ("dataset", [])]
)
def test_an_evaluation_of_other_things_is_none(tmp_path, name, value):
    (tmp_path / CONFIG_NAME).write_bytes((pruned() / CONFIG_NAME).read_bytes())
    row = {"dataset": "x", "windows": 4, "sequence_length": 8, "perplexity": 2.0}
    (tmp_path / "evaluation.json").write_text(json.dumps({**row, name: value}))
    assert Outcome.read(tmp_path).evaluations == ()
