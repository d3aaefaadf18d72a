import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa import DataConfig, DSAConfig, RecoveryConfig, UpdateConfig
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.model.architecture import GRANULARITIES
from optimum_dsa.pruning.allocation import ALLOCATIONS, Allocation
from optimum_dsa.pruning.configuration import CONFIG_NAME
from optimum_dsa.pruning.unstructured.methods import METHODS, Method
from optimum_dsa.pruning.unstructured.metrics import METRICS
from optimum_dsa.pruning.unstructured.updates import UPDATES


def optional(strategy):
    return st.none() | strategy


configs = st.builds(
    DSAConfig,
    sparsity=st.floats(0, 0.99),
    method=st.sampled_from(sorted(METHODS)),
    allocation=st.sampled_from([*sorted(ALLOCATIONS), "abslog/var/atan,asin/no_op@+0.1"])
    | st.just(Allocation({"a": 0.5}, {"a": 4})),
    spread=optional(st.floats(0, 1)),
    pattern=optional(st.sampled_from(["row", "matrix", "group:64", "mixed:1000"])),
    update=st.builds(
        UpdateConfig,
        name=optional(st.sampled_from(sorted(UPDATES))),
        damping=st.floats(0, 10),
    ),
    granularity=st.sampled_from(GRANULARITIES),
    data=st.builds(
        DataConfig,
        num_samples=optional(st.integers(1, 10**6)),
        sequence_length=optional(st.integers(2, 10**6)),
        seed=st.integers(0, 2**31),
    ),
    exclude=st.lists(st.text(max_size=9), max_size=3),
    include=st.lists(st.text(max_size=9), max_size=3).map(tuple),
    skip_unprunable=st.booleans(),
    metric=optional(st.sampled_from(sorted(METRICS))),
    batch_size=st.integers(1, 999),
)


@given(config=configs, sequential=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_config_survives_json(config, sequential):
    # one of both is always off
    config = replace(config, sequential=sequential, update=replace(config.update, true_sequential=sequential))
    assert DSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(DSAConfig(0.5).to_dict())


@given(
    data=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=9), json_values, max_size=4), sparsity=json_values
)
@settings(max_examples=400, deadline=None)
def test_any_json_is_a_config_or_a_clear_error(data, sparsity):
    try:
        config = DSAConfig.from_dict({"sparsity": sparsity, **data})
    except (ValueError, UnknownNameError, FileNotFoundError) as error:
        assert len(str(error)) > 10
    else:
        assert DSAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"sparsity": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsity": "0.5"}, "got '0.5'"),
        ({"sparsity": True}, "got True"),
        ({"method": "wandas"}, "Unknown method 'wandas'. Did you mean 'wanda'"),
        ({"allocation": "owls"}, "Unknown allocation 'owls'. Did you mean 'owl'"),
        ({"allocation": "abs/vra/sin"}, "Unknown reduction 'vra'. Did you mean 'var'"),
        ({"allocation": "missing.json"}, "No allocation file 'missing.json'"),
        ({"pattern": "two:four"}, "Unknown pattern"),
        ({"update": "obs"}, "Unknown update 'obs'"),
        ({"metric": "wnada"}, "Did you mean 'wanda'"),
        ({"granularity": "layer"}, "'block' or 'matrix' or 'block:kind', got 'layer'"),
        ({"data": {"num_samples": 0}}, "num_samples is a whole number of at least 1"),
        ({"data": {"sequence_length": 2.5}}, "sequence_length"),
        ({"data": {"seed": -1}}, "seed"),
        ({"data": {"sede": 1}}, "DataConfig has no 'sede'. Did you mean 'seed'"),
        ({"data": 3}, "data is a DataConfig, got 3"),
        ({"update": {"damping": -1}}, "damping is a number of at least 0, got -1"),
        ({"sequential": False, "update": UpdateConfig(true_sequential=True)}, "leave out one of both"),
        ({"pattern": "", "sparsity": 0.5}, "Unknown pattern ''"),
        ({"metric": ""}, "Unknown metric ''"),
        ({"pattern": "mixed:8", "sparsity": 0.9}, "which leaves 0/8 to 7/8; choose a larger M"),
        ({"pattern": "mixed:4", "sparsity": 0.8}, "which leaves 0/4 to 3/4; choose a larger M"),
        ({"spread": 2}, "half-width"),
        ({"exclude": "lm_head"}, r"Write exclude=\['lm_head'\]"),
        ({"max_sparsity": 0.4}, "widen min_sparsity / max_sparsity"),
        ({"pattern": "2:4", "sparsity": 0.7, "allocation": "uniform"}, "use sparsity=0.5 or pattern='mixed:4'"),
        ({"pattern": "2:4"}, "nothing to allocate; use allocation='uniform'"),
    ],
)
def test_a_wrong_value_is_named_with_the_rule(changes, message):
    with pytest.raises((ValueError, UnknownNameError, FileNotFoundError), match=message):
        DSAConfig(**{"sparsity": 0.5, **changes})


def test_a_misspelt_key_is_an_error_with_the_near_one():
    with pytest.raises(ValueError, match="no 'sparcity'.*Did you mean 'sparsity'"):
        DSAConfig.from_dict({"sparcity": 0.5})


def test_saving_and_loading(tmp_path):
    config = DSAConfig(0.6, "sparsegpt", "owl", exclude=["lm_head"])
    config.save_pretrained(tmp_path / "here")
    assert DSAConfig.from_pretrained(tmp_path / "here") == config
    assert DSAConfig.from_pretrained(tmp_path / "here" / CONFIG_NAME) == config
    (tmp_path / "here" / CONFIG_NAME).write_text('{"config": {"sparsity": 0.6, "metod": "wanda"}}')
    with pytest.raises(ValueError, match="Did you mean 'method'"):
        DSAConfig.from_pretrained(tmp_path / "here")


def test_what_is_given_replaces_a_part_of_the_methods_row():
    assert DSAConfig(0.5, "sparsegpt").recipe == Method("obs", "group:128", "sparsegpt")
    assert DSAConfig(0.5, "wanda", update="sparsegpt", pattern="matrix").recipe == Method(
        "wanda", "matrix", "sparsegpt"
    )


def test_every_method_is_made_of_known_parts_with_a_reference():
    for name, method in METHODS.items():
        assert method.metric in METRICS and method.update in UPDATES
        assert METHODS.references[name].startswith("https://")
        DSAConfig(0.5, name)


def test_an_allocator_that_exists_per_matrix_only_is_computed_per_matrix():
    assert DSAConfig(0.5, allocation="er").unit_granularity == "matrix"
    assert DSAConfig(0.5, allocation="dsa").unit_granularity == "block"


@pytest.mark.parametrize("cls,first", [(DSAConfig, {"sparsity": 0.5}), (RecoveryConfig, {})])
def test_settings_of_a_section_are_taken_and_read_by_their_own_name_with_a_warning(cls, first):
    with pytest.warns(FutureWarning, match=r"seed is a setting of its data: write data=DataConfig\(seed=...\)"):
        config = cls(**first, seed=3)
    assert config == cls(**first, data=DataConfig(seed=3))
    with pytest.warns(FutureWarning, match=r"read .data.seed"):
        assert config.seed == 3
    with pytest.warns(FutureWarning):
        assert replace(config, split="test").data == DataConfig(seed=3, split="test")
    with pytest.raises(AttributeError, match="sede"):
        _ = config.sede


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    earlier = {"sparsity": 0.5, "update": "sparsegpt", "damping": 0.1, "num_samples": 4, "seed": 2}
    expected = DSAConfig(0.5, update=UpdateConfig("sparsegpt", 0.1), data=DataConfig(4, seed=2))
    for content in ({"format_version": 2, "config": earlier}, {"format_version": 1, "config": earlier}, earlier):
        (tmp_path / CONFIG_NAME).write_text(json.dumps(content))
        assert DSAConfig.from_pretrained(tmp_path) == expected
