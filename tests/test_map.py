"""What the page "Map of the code" promises: a new row is a row, and everything else follows it."""

import json
import re
import sys
from pathlib import Path

import pytest

from optimum_dsa import (
    ALLOCATIONS,
    METRICS,
    STRATEGIES,
    UPDATES,
    Allocation,
    DSAConfig,
    DSAPruner,
    Heuristic,
    schema,
    verify,
)
from optimum_dsa.commands.register.register_dsa import REGISTER_COMMANDS  # noqa: F401 - it must be there
from optimum_dsa.common.settings import options_of
from optimum_dsa.recovery.configuration import RecoveryConfig
from optimum_dsa.sharing.provenance import command, papers

from .tiny import tiny_llama, tokens


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/source/map.md").read_text(encoding="utf-8")
ADDRESS = "https://example.org/paper"


@pytest.fixture
def row(request):
    """Adds a row to a table for one test."""
    table, name, operation, facts = request.param
    table.add(name, operation, reference=ADDRESS, **facts)
    yield name
    del table[name]


def reversed_magnitude(weight, statistics):
    return 1 / (1 + weight.float().abs())


def halve(weight, statistics, choice):
    return (weight * 0.5).masked_fill(~choice.keep, 0)


def largest_first(weight, statistics, choice):
    assert choice.keep is None and statistics.gram is not None
    gone = weight.abs().flatten().argsort(descending=True)[: choice.count]
    return weight.flatten().index_fill(0, gone, 0).view_as(weight)


def round_trip(config, folder):
    """A model pruned by `config`, saved, loaded and verified; what its description says."""
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), config)
    pruner.save_pretrained(folder)
    again = DSAPruner.from_pretrained(folder)
    assert again.verify().holds and verify(again.model, again.report).removed == round(0.5 * again_size(again))
    return json.loads((folder / "dsa_config.json").read_text())


def again_size(pruner):
    return sum(pruner.report.allocation.sizes.values())


@pytest.mark.parametrize("row", [(METRICS, "reversed", reversed_magnitude, {"reads": "nothing"})], indirect=True)
def test_a_metric_is_one_row(row, tmp_path):
    facts = round_trip(DSAConfig(0.5, "magnitude", "uniform", metric=row), tmp_path)
    assert facts["config"]["metric"] == row
    assert papers(facts["config"])[f"metric {row}"] == ADDRESS and f"--metric {row}" in command(facts)


@pytest.mark.parametrize(
    "row,removed",
    [
        ((UPDATES, "halve", halve, {}), "the smallest"),
        ((UPDATES, "largest", largest_first, {"reads": "gram", "chooses": True}), "the largest"),
    ],
    indirect=["row"],
)
def test_an_update_is_one_row_also_one_that_chooses(row, removed, tmp_path):
    config = DSAConfig(0.5, "magnitude", "uniform", update=row)
    assert config.resolved.chooses is (removed == "the largest")
    facts = round_trip(config, tmp_path)
    assert papers(facts["config"])[f"update {row}"] == ADDRESS and f"--update {row}" in command(facts)
    dense, pruned = tiny_llama(), DSAPruner.from_pretrained(tmp_path).model
    weight, gone = (model.model.layers[0].mlp.up_proj.weight for model in (dense, pruned))
    kept, away = weight[gone != 0].abs(), weight[gone == 0].abs()
    assert (away.min() >= kept.max()) if removed == "the largest" else (away.max() <= kept.min())


@pytest.mark.parametrize(
    "row",
    [(ALLOCATIONS, "ends", Heuristic(lambda unit: unit.depth, lambda m, target, spread: m, reads="nothing"), {})],
    indirect=True,
)
def test_an_allocator_is_one_row(row, tmp_path):
    facts = round_trip(DSAConfig(0.5, "magnitude", row), tmp_path)
    found = Allocation.load(tmp_path)
    assert list(found.sparsity.values()) == sorted(found.sparsity.values()) and found.name == row
    assert papers(facts["config"])[f"allocation {row}"] == ADDRESS and f"--allocation {row}" in command(facts)


@pytest.mark.parametrize("cls", [DSAConfig, RecoveryConfig])
def test_a_setting_is_one_field(cls):
    """Its option, its part of the schema and its place in the command that makes a model again follow from it."""
    names = options_of(cls)
    assert {"seed", "sequence_length", "split"} <= names.keys()
    if cls is DSAConfig:
        config = schema()["properties"]["config"]["properties"]
        sections = ("data", "update", "reconstruct", "values")
        inner = config | {k: v for name in sections for k, v in config[name]["properties"].items()}
        assert names.keys() <= inner.keys()


def test_the_map_names_what_is_there():
    named = set(re.findall(r"`((?:optimum_dsa|docs|tests|examples)/[\w/.]+)`", PAGE))
    assert len(named) > 15 and all((ROOT / path).exists() for path in named), named
    strategies = sys.modules[STRATEGIES["named"].__module__].__file__
    assert "optimum_dsa/search/strategies.py" in named and strategies.endswith("search/strategies.py")
    for line in PAGE.splitlines():
        if line.startswith("| a") and "`optimum_dsa" in line:
            cells = line.strip("|").split("|")
            assert len(cells) == 3, line


def test_every_room_is_on_the_map():
    rooms = {path.name for path in (ROOT / "optimum_dsa").iterdir() if (path / "__init__.py").is_file()}
    assert all(f"`{room}`" in PAGE for room in rooms), rooms
