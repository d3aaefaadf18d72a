"""A setting's rule is one law: for values, for files, for words."""

from dataclasses import dataclass, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa import DataConfig, DSAConfig, RecoveryConfig, UpdateConfig
from optimum_dsa.common.schema import violations
from optimum_dsa.common.settings import (
    Rule,
    check_settings,
    describe_settings,
    flattened,
    nested,
    options_of,
    rule_of,
    section,
    setting,
    settings_from,
    settings_to,
)


CLASSES = [DSAConfig, DataConfig, UpdateConfig, RecoveryConfig]
RULES = {
    f"{cls.__name__}.{field.name}": rule_of(field)
    for cls in CLASSES
    for field in fields(cls)
    if rule_of(field).kind is not None
}
values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(-2, 3), st.just(10**400), st.text(max_size=4),
    st.sampled_from(["block", "matrix", "block:kind", "allocation", "uniform"]),
    st.lists(st.text(max_size=3) | st.integers(0, 3), max_size=2),
)  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@given(value=values)
@settings(max_examples=40, deadline=None)
def test_a_rule_allows_what_its_schema_does(name, value):
    assert RULES[name].allows(value) is not any(violations(value, RULES[name].schema()))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_is_in_the_docstring(cls):
    assert describe_settings(cls).keys() == {field.name for field in fields(cls)}
    assert all(text.endswith((".", "]")) for text in describe_settings(cls).values())


@dataclass(frozen=True)
class Inner:
    """Args:
    name (`str`, *optional*): Of it.
    size (`int`): How large it is.
    """

    name: str | None = None
    size: int = setting(1, low=1)

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True)
class Outer:
    share: float = setting(low=0, below=1, what="a share")
    inner: Inner = section(Inner, shorthand="name")
    kinds: tuple[str, ...] = ()

    def __post_init__(self):
        check_settings(self)


def test_sections_are_given_whole_as_an_object_or_by_their_shorthand():
    expected = Outer(0.5, Inner("x"))
    assert (
        Outer(0.5, "x") == expected == Outer(0.5, {"name": "x"}) == settings_from(Outer, {"share": 0.5, "inner": "x"})
    )
    assert Outer(0.5).inner == Inner() and Outer(0.5, kinds=["a"]).kinds == ("a",)
    with pytest.raises(ValueError, match="inner is a Inner, got 3"):
        Outer(0.5, 3)
    with pytest.raises(ValueError, match="size is a whole number of at least 1, got 0"):
        Outer(0.5, {"size": 0})
    with pytest.raises(ValueError, match=r"share is a share, in \[0, 1\), got 1"):
        Outer(1)


def test_flat_names_and_sections_are_one_another():
    config = Outer(0.5, Inner("x", 3))
    data = settings_to(config)
    flat = flattened(Outer, data)
    assert flat == {"share": 0.5, "inner": "x", "size": 3, "kinds": []} and flat.keys() == options_of(Outer).keys()
    assert settings_from(Outer, nested(Outer, flat)) == settings_from(Outer, data) == config
    assert nested(Outer, {"share": 0.5}) == {"share": 0.5}


def test_a_name_that_is_no_setting_is_refused_with_the_near_one():
    with pytest.raises(ValueError, match="Outer has no 'shear'. Did you mean 'share'"):
        settings_from(Outer, {"shear": 0.5})
    with pytest.raises(ValueError, match="Outer needs a 'share'"):
        settings_from(Outer, {})


def test_what_a_rule_says():
    assert str(Rule("float", low=0, high=1)) == "a number, in [0, 1]"
    assert str(Rule("int", low=2)) == "a whole number of at least 2"
    assert str(Rule("str", choices=("a", "b"))) == "'a' or 'b'" and str(Rule("bool")) == "true or false"


def test_the_name_of_a_section_is_told_by_the_section():
    for value in ("int5", {"name": "int5"}):
        with pytest.raises(ValueError, match="^values is 'int8' or 'int4', got 'int5'"):
            DSAConfig(0.5, values=value)
