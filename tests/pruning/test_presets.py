"""A quality fills in what was not given, and is refused beside what contradicts it."""

import re

import pytest

from optimum_dsa import QUALITIES, DataConfig, DSAConfig, UpdateConfig
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.common.settings import flattened, nested, options_of, settings_from
from optimum_dsa.pruning.presets import CHOSEN, with_quality


def flat(config: DSAConfig) -> dict:
    return flattened(DSAConfig, config.to_dict())


@pytest.mark.parametrize("name", QUALITIES)
def test_a_quality_is_the_settings_it_says_and_the_defaults_otherwise(name):
    row = QUALITIES[name]
    said = {**row.decides, **row.fills}
    assert said.keys() <= options_of(DSAConfig).keys() and not row.decides.keys() & row.fills.keys()
    explicit = settings_from(DSAConfig, nested(DSAConfig, {"sparsity": 0.6, **said}))
    assert DSAConfig.preset(name, 0.6) == explicit
    assert QUALITIES.fact(name, "about") and QUALITIES.fact(name, "costs") >= 1
    assert str(row).startswith(row.decides["method"])


@pytest.mark.parametrize("name", QUALITIES)
@pytest.mark.parametrize(
    "given",
    [
        {"num_samples": 3},
        {"sequence_length": 64, "batch_size": 2},
        {"allocation": "owl"},
        {"pattern": "mixed:8", "granularity": "matrix"},
        {"exclude": ("lm_head",), "damping": 0.1, "max_sparsity": 0.9},
    ],
)
def test_what_is_given_stays_and_all_else_is_the_quality_s(name, given):
    found, plain = flat(DSAConfig.preset(name, 0.5, **given)), flat(DSAConfig.preset(name, 0.5))
    want = plain | {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    assert found == want


def test_a_section_that_is_given_whole_is_taken_whole():
    data = DataConfig(num_samples=3)
    assert DSAConfig.preset("fast", 0.5, data=data).data == data
    assert DSAConfig.preset("fast", 0.5, data={"num_samples": 3}).data.sequence_length == 512


def test_without_a_quality_nothing_changed():
    config = DSAConfig(0.5)
    assert (config.method, config.allocation, config.update.targets) == ("wanda", "dsa", "sparse")
    assert config.data == DataConfig() and config.update == UpdateConfig()


@pytest.mark.parametrize("name", QUALITIES)
def test_strict_patterns_are_uniform_unless_another_allocation_is_asked_for(name):
    assert DSAConfig.preset(name, 0.5, pattern="2:4").allocation == "uniform"
    with pytest.raises(ValueError, match="nothing to allocate"):
        DSAConfig.preset(name, 0.5, pattern="2:4", allocation="dsa")


@pytest.mark.parametrize("name", QUALITIES)
def test_what_contradicts_is_refused_with_both_names(name):
    row = QUALITIES[name]
    other = {setting: not value if isinstance(value, bool) else "another" for setting, value in row.decides.items()}
    for setting, value in ({"method": "ria", "metric": "obs", "update": "refit"} | other).items():
        with pytest.raises(ValueError, match=f"quality '{name}'.*{setting}.*{re.escape(repr(value))}.*leave out one"):
            with_quality(name, {"sparsity": 0.5, setting: value})
    with pytest.raises(ValueError, match="update"):
        DSAConfig.preset(name, 0.5, update=UpdateConfig("refit"))
    # To say what it says is no contradiction, but for what a method is made of.
    for setting in row.decides.keys() - {*CHOSEN}:
        assert with_quality(name, {"sparsity": 0.5, setting: row.decides[setting]})


def test_a_quality_that_is_not_there_is_named():
    with pytest.raises(UnknownNameError, match="Unknown quality 'god'. Did you mean 'good'"):
        DSAConfig.preset("god", 0.5)
