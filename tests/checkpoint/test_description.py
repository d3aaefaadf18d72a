"""`dsa_config.json`: schema, versions, checksum."""

import json
from dataclasses import fields

import pytest

from optimum_dsa import Allocation, DSAConfig, DSAStructuredConfig, PruningReport, Reconstruction
from optimum_dsa.checkpoint.description import (
    MIGRATIONS,
    DescriptionError,
    checksum,
    describe,
    is_unchanged,
    read_description,
    report_from,
    schema,
    write_description,
)
from optimum_dsa.common.schema import KEYWORDS, violations
from optimum_dsa.pruning.configuration import CONFIG_NAME, FORMAT_VERSION


BASE = {"name": "some/model", "revision": None}


def report(**changes):
    allocation = Allocation({"layers.0": 0.25, "layers.1": 0.75}, {"layers.0": 8, "layers.1": 8}, "owl")
    facts = {
        "config": DSAConfig(0.5, allocation="owl", exclude=("router",)),
        "allocation": allocation,
        "achieved": {"layers.0": 0.25, "layers.1": 0.75},
        "parameters": 20,
        "calibration": {"source": "wikitext2", "samples": 8},
        "dense": {"layers.0.router": "excluded"},
        "damping": {"layers.0.up": 0.1},
        "unseen": ("layers.1.down",),
        "permuted": {"layers.0.down": (0.75, 0.8)},
        "reconstruction": {"layers.0": Reconstruction(0.25, 0.125, 1e-3, 64)},
        "seconds": 1.5,
        "compared": {"owl": 0.1, "uniform": 0.2},
        "compared_on": {"windows": 4, "length": 16},
        "chosen_by": "elsa",
    }
    return PruningReport(**{**facts, **changes})


def test_what_is_written_is_read(tmp_path):
    write_description(tmp_path, describe(report(), BASE))
    data = read_description(tmp_path)
    assert data["format_version"] == FORMAT_VERSION and data["base_model"] == BASE
    assert report_from(data) == report()
    assert is_unchanged(data) and is_unchanged(read_description(tmp_path / CONFIG_NAME))
    assert DSAConfig.from_pretrained(tmp_path) == report().config
    assert Allocation.load(tmp_path) == report().allocation


def test_reports_without_the_optional_parts_round_trip(tmp_path):
    bare = PruningReport(DSAConfig(0.5, allocation="uniform"), report().allocation, report().achieved, 20)
    write_description(tmp_path, describe(bare, {"name": None, "revision": None}))
    assert report_from(read_description(tmp_path)) == bare


def test_the_schema_has_every_field_and_uses_no_keyword_that_is_not_checked():
    properties = schema()["properties"]
    assert properties["config"]["properties"].keys() == {field.name for field in fields(DSAConfig)}
    cut = schema()["$defs"]["cut"]["properties"]["config"]["properties"]
    assert cut.keys() == {field.name for field in fields(DSAStructuredConfig)}
    more = {"base_files", "checksum", "zeros_before", "dense_sizes", "trained_before", "structured", "distillation"}
    assert properties.keys() == {*describe(report(), BASE, {}), *more}
    assert properties["format_version"]["const"] == FORMAT_VERSION

    def keywords(part):
        for name, value in part.items():
            yield name
            for inner in (value,) if name in ("items", "additionalProperties") else ():
                if isinstance(inner, dict):
                    yield from keywords(inner)
            if name in ("properties", "$defs"):
                for inner in value.values():
                    yield from keywords(inner)
            if name == "anyOf":
                for inner in value:
                    yield from keywords(inner)

    assert set(keywords(schema())) <= KEYWORDS


def test_the_schema_is_json_schema_and_other_validators_agree():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(describe(report(), BASE), schema())


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("config.sparsity", 1.5, "config.sparsity breaks exclusiveMaximum 1, got 1.5"),
        ("config.sparsity", "much", "config.sparsity is number, got 'much'"),
        ("config.sparsity", True, "config.sparsity is number"),
        ("config.sparsity", float("nan"), "config.sparsity is number"),
        ("config.sparsitty", 0.5, "config.sparsitty is no known key"),
        ("config.granularity", "row", "config.granularity is 'block' or 'matrix' or 'block:kind', got 'row'"),
        ("config.exclude", "router", "config.exclude is array"),
        ("config.exclude", [1], r"config.exclude\[0\] is string"),
        ("config.allocation", 7, "config.allocation is object, got 7"),
        ("config.data.num_samples", 0, "config.data.num_samples breaks minimum 1"),
        ("allocation.sizes.layers1", 1.5, "allocation.sizes.layers1 is integer"),
        ("allocation.sparsity.layers1", 2, "allocation.sparsity.layers1 breaks maximum 1"),
        ("achieved.units", [], "achieved.units is object"),
        ("base_model", None, "base_model is object"),
        ("unseen", None, "unseen is array"),
        ("reconstruction.layers0", {"before": 1}, "reconstruction.layers0.after is missing"),
        ("seconds", -1, "seconds breaks minimum 0"),
        ("versions.torch", 2, "versions.torch is string"),
        ("dense", None, "dense is object"),
    ],
)
def test_what_breaks_the_schema_is_named(tmp_path, path, value, message):
    data = describe(report(), BASE)
    *parents, name = path.split(".")
    part = data
    for parent in parents:
        part = part[parent]
    part[name] = value
    write_description(tmp_path, data)
    with pytest.raises(DescriptionError, match=f"does not follow its schema: {message}"):
        read_description(tmp_path)


@pytest.mark.parametrize("name", [name for name in schema()["required"] if name not in ("format_version",)])
def test_what_is_missing_is_named(tmp_path, name):
    data = describe(report(), BASE)
    del data[name]
    write_description(tmp_path, data)
    if name in ("allocation", "achieved"):
        assert read_description(tmp_path) is None  # a configuration, and no result
    else:
        with pytest.raises(DescriptionError, match=f"{name} is missing"):
            read_description(tmp_path)


def test_other_keys_are_allowed_beside_ours():
    assert not list(violations({**describe(report(), BASE), "evaluation": {"perplexity": 9.1}}, schema()))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"allocation": {}, "achieved": {}}', "3"])
def test_what_is_no_description_is_refused(tmp_path, content):
    (tmp_path / CONFIG_NAME).write_text(content)
    with pytest.raises(DescriptionError):
        read_description(tmp_path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "2", True])
def test_versions_that_are_not_known_are_refused(tmp_path, version):
    write_description(tmp_path, {**describe(report(), BASE), "format_version": version})
    with pytest.raises(DescriptionError, match="format_version is|pip install .` in a newer"):
        read_description(tmp_path)
    with pytest.raises(ValueError, match="version"):
        DSAConfig.from_pretrained(tmp_path)


def old(tmp_path, *without, **changes):
    """A `dsa_config.json` as version 1 wrote it."""
    data = {**describe(report(), BASE), "format_version": 1}
    data["config"] = {**data["config"], **changes}
    (tmp_path / CONFIG_NAME).write_text(json.dumps({k: v for k, v in data.items() if k not in without}))


@pytest.mark.parametrize("without", [(), ("format_version",), ("format_version", "versions", "base_model")])
def test_the_first_version_is_read_whether_it_says_so_or_not(tmp_path, without):
    old(tmp_path, *without)
    data = read_description(tmp_path)
    assert data["format_version"] == FORMAT_VERSION
    assert report_from(data) == report() and is_unchanged(data)
    assert sorted(MIGRATIONS) == list(range(1, FORMAT_VERSION))


def test_the_path_of_an_allocation_is_replaced_by_what_was_in_it(tmp_path):
    old(tmp_path, allocation="/home/somebody/found.json")
    assert report_from(read_description(tmp_path)).config.allocation == report().allocation
    found = tmp_path / "found.json"
    report().allocation.save(found)
    given = report(config=DSAConfig(0.5, allocation=str(found)))
    assert str(tmp_path) not in json.dumps(describe(given, BASE))
    for name in ("owl", "abslog/var/sin/no_op@+0.08", "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)"):
        assert describe(report(config=DSAConfig(0.5, allocation=name)), BASE)["config"]["allocation"] == name


def test_an_allocation_that_only_its_author_registered_is_known_by_its_numbers(tmp_path):
    data = describe(report(), BASE)
    data["config"]["allocation"] = "my_own"
    write_description(tmp_path, data)
    again = read_description(tmp_path)
    assert is_unchanged(again) and report_from(again).config.allocation == report().allocation


def test_an_edit_is_noticed_and_the_order_of_keys_is_none(tmp_path):
    write_description(tmp_path, describe(report(), BASE))
    data = read_description(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(dict(reversed(data.items()))))
    assert is_unchanged(read_description(tmp_path))
    data["config"]["seed"] = 1
    assert not is_unchanged(data)
    assert is_unchanged({**data, "checksum": checksum(data)})


def test_a_name_that_is_registered_nowhere_is_named(tmp_path):
    old(tmp_path, metric="my_own")
    with pytest.raises(DescriptionError, match="my_own.*Import what registers own names first"):
        report_from(read_description(tmp_path))
