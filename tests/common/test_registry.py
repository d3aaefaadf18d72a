import re
from pathlib import Path

import pytest

import optimum_dsa
from optimum_dsa.common.registry import Registry, UnknownNameError


@pytest.fixture
def registry():
    registry = Registry("reduction")

    @registry.register(reference="https://example.org", matrix=True)
    def variance(x):
        return x

    registry.add("mean", max)
    return registry


def test_an_operation_is_known_by_its_own_name_with_its_facts(registry):
    assert registry["variance"].__name__ == "variance"
    assert registry.references == {"variance": "https://example.org", "mean": None}
    assert registry.fact("variance", "matrix") is True
    assert registry.fact("mean", "matrix", False) is False


def test_an_unknown_name_is_answered_with_the_near_one(registry):
    with pytest.raises(
        UnknownNameError, match="^Unknown reduction 'varianse'. Did you mean 'variance'\\? Known: mean"
    ):
        registry["varianse"]


def test_a_name_is_taken_once_and_free_again_after_deletion(registry):
    with pytest.raises(ValueError, match="already registered"):
        registry.add("mean", min)
    del registry["mean"]
    registry.add("mean", min)
    assert registry["mean"] is min


def test_who_asks_a_table_has_its_rows():
    """A table made in one module and filled in others is imported from where it is full, but by who adds rows.

    In a process that imported nothing else, it would be empty.
    """
    sources = {path: path.read_text() for path in Path(optimum_dsa.__file__).parent.rglob("*.py")}
    made = {
        name: path
        for path, source in sources.items()
        for name in re.findall(r"^([A-Z_]+) = Registry\(", source, re.MULTILINE)
    }
    elsewhere = 0
    for name, home in made.items():
        adds = re.compile(rf"\b{name}\.(register|add)\(")
        if adds.search(sources[home]) or name in sources[home.parent / "__init__.py"]:
            continue  # full where it is made, or by its package, which is imported first
        for path, source in sources.items():
            found = re.search(rf"^from \.\S*\b{home.stem} import [^(\n]*\b{name}\b", source, re.MULTILINE)
            if found and path.name != "__init__.py":
                elsewhere += 1
                assert adds.search(source), f"{path} takes {name} from where it is empty"
    assert elsewhere
