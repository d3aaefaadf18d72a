"""The tool that puts faults into the package: which it makes, and which it never makes."""

import importlib.util
from pathlib import Path

import pytest


FILE = Path(__file__).resolve().parents[1] / "tools" / "mutants.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("mutants", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "code,expected",
    [
        ("x = a + b", {"(a) - (b)"}),
        ("x = a < b", {"(a) <= (b)", "(a) >= (b)"}),
        (
            "x = 0 <= a < b",
            {"(0) < (a) < (b)", "(0) > (a) < (b)", "(0) <= (a) <= (b)", "(0) <= (a) >= (b)", "1", "-1"},
        ),
        ("x = a and b", {"(a) or (b)", "(a)", "(b)"}),
        ("x = not a", {"a"}),
        ("x = -a", {"a"}),
        ("x = True", {"False"}),
        ("x = 0.5", {"1.0", "0.25"}),
        ("f(a[b:c])", {":c:", "b::"}),
        ("x += a", {"x -= a"}),
        ("x = a if b else c", {"not (b)", "True", "False"}),
        ("x = [a for a in b if a]", {"True"}),
        ("x = min(a, b)", {"max"}),
        ("x = a.any(b)", {"a.all(b)"}),
        ("def f() -> 3 | 4:\n    return a", {"None"}),
    ],
)
def test_what_is_changed(tool, code, expected):
    assert {after for _, _, after, _ in tool.mutants(code)} == expected
    for _, _, _, source in tool.mutants(code):
        compile(source, "mutant", "exec")
        assert source != code


@pytest.mark.parametrize(
    "code",
    [
        "x: int | None = a", "Known = A | B", "@d(a + 1)\ndef f(x: 1 + 2): pass", "x = f'{a + 1}'", "raise E(a + 1)",
        "assert a < b", "logger.info(a + 1)", "'''1 + 2'''", "from a import b", "name = 'text'",
    ],
)  # fmt: skip
def test_what_is_left_alone(tool, code):
    assert list(tool.mutants(code)) == []


def test_a_sample_stays_what_it_is_where_other_code_changes(tool):
    everything = [{"id": str(number)} for number in range(100)]
    chosen = tool.sample(everything, 0, 20)
    assert chosen == tool.sample(everything[::-1], 0, 20) != tool.sample(everything, 1, 20)
    without = [mutant for mutant in everything if mutant is not chosen[3]]
    assert tool.sample(without, 0, 19) == [mutant for mutant in chosen if mutant is not chosen[3]]


def test_every_module_has_files_that_test_it(tool):
    root = FILE.parents[1]
    modules = {mutant["module"] for mutant in tool.population(root / tool.PACKAGE)}
    assert len(modules) > 25
    assert {module for module in modules if not tool.test_files(module, root / "tests")} == set()
