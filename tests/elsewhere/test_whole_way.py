"""Load, prune, save, load in a fresh process without this package, and use as users do: one row a family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .families import FAMILIES
from .ways import FORMS, check_same, used, walked


ROWS = [(family, form) for family in FAMILIES for form in FORMS]
# What says how, or by which release, a checkpoint was written, and nothing of its model.
OF_WRITING = {"transformers_version", "quantization_config", "dtype", "transformers_weights", "_name_or_path"}
# What a tokenizer adds when it is saved a second time: how it was loaded, and a table that it has made of its words.
OF_WRITING |= {"is_local", "local_files_only", "model_specific_special_tokens"}


@pytest.fixture(scope="module")
def ways(tmp_path_factory, modules):
    """Every family's way, or the error that it ended in, and what the fresh process found in each folder."""
    home, done, asked = tmp_path_factory.mktemp("ways"), {}, {}
    for name in FAMILIES:
        try:
            done[name] = way = walked(name, home)
        except Exception as error:  # noqa: BLE001 - a family that fails fails its own tests
            done[name] = error
            continue
        for form, folder in way.out.items():
            needed = "optimum_dsa" if form == "compressed" else None  # a dense one needs nothing of ours
            asked[f"{name}/{form}"] = (FAMILIES[name].use, folder, needed)
    return done, used(asked, home)


@pytest.fixture
def way(ways, family):
    if isinstance(ways[0][family], Exception):
        raise ways[0][family]
    return ways[0][family]


@pytest.mark.parametrize("family,form", ROWS)
def test_a_fresh_process_has_the_model_that_was_in_memory(family, form, way, ways):
    check_same(ways[1][f"{family}/{form}"], way.expected)
    assert sum(way.expected["zeros"].values()) >= way.pruner.report.removed > 0


@pytest.mark.parametrize("family,form", ROWS)
def test_what_lies_beside_the_weights_is_the_bases(family, form, way):
    base, out = way.base, way.out[form]
    for file in base.rglob("*"):
        name = file.relative_to(base)
        if file.is_dir() or name.suffix == ".safetensors" or name.name in ("config.json", "README.md"):
            continue
        assert (out / name).is_file(), name
        if name.suffix == ".json":
            assert content(out / name) == content(file), name
        else:
            assert (out / name).read_bytes() == file.read_bytes(), name
    if FAMILIES[family].use != "adapter":
        assert content(out / "config.json") == content(base / "config.json")
        assert content(out / "config.json")["architectures"] == [way.expected["class"]]


def content(file: Path):
    read = json.loads(file.read_text())
    if file.name == "adapter_config.json":  # sets in any order; and the base is another now
        read |= {"target_modules": sorted(read["target_modules"]), "base_model_name_or_path": None}
    return without(read)


def without(value):
    """JSON without what is of writing, at any depth."""
    if isinstance(value, dict):
        return {name: without(part) for name, part in value.items() if name not in OF_WRITING}
    return [without(part) for part in value] if isinstance(value, list) else value
