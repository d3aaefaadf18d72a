"""What is promised of releases: bounds, pins and pages say the same, and nothing is imported that is not asked for."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from optimum_dsa.common.fence_rows import FENCES


ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.cfg").is_file():
    pytest.skip("only in a checkout", allow_module_level=True)
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# what users install, and what only whoever works on it does
RUNTIME = ("peft", "evaluate", "plots", "eval", "milp")
# name of an import -> name of the distribution, where they differ
DISTRIBUTIONS = {
    "lm_eval": "lm-eval",
    "huggingface_hub": "huggingface-hub",
    "PIL": "pillow",
    "markdown_it": "markdown-it-py",
    "yaml": "pyyaml",
}


def requirements(*extras: str) -> dict[str, Requirement]:
    """Distribution -> what setup.cfg asks of it, with extras or (no argument) in all of them."""
    texts = SETUP["options"]["install_requires"].splitlines()
    for extra in extras or SETUP["options.extras_require"]:
        texts += SETUP["options.extras_require"][extra].splitlines()
    lines = [line for line in texts if line.strip() and not line.strip().startswith("#")]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pins(name: str) -> dict[str, Version]:
    """Distribution -> its exact release in a constraints file."""
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert all(line.count("==") == 1 for line in lines), lines
    return {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


def bound(requirement: Requirement) -> Version:
    """The lowest release that a requirement takes."""
    (specifier,) = requirement.specifier
    assert specifier.operator in (">=", "=="), requirement
    return Version(specifier.version)


def test_the_tested_releases_are_those_of_every_direct_dependency_and_satisfy_it():
    asked, pinned = requirements(), pins("constraints.txt")
    assert pinned.keys() == asked.keys()
    for name, version in pinned.items():
        assert version in asked[name].specifier, name


def test_the_oldest_releases_are_the_lower_bounds():
    asked, oldest, pinned = requirements(*RUNTIME), pins("constraints-oldest.txt"), pins("constraints.txt")
    assert asked.keys() <= oldest.keys()
    for name, requirement in asked.items():
        if name != "torch":  # older ones have no CPU build for every Python
            assert oldest[name] == bound(requirement), name
    assert oldest["torch"] == pinned["torch"] >= bound(asked["torch"])
    tools = oldest.keys() - asked.keys()
    assert tools == requirements("tests").keys() - asked.keys()
    assert {name: oldest[name] for name in tools} == {name: pinned[name] for name in tools}


def test_extras_for_work_ask_for_no_other_releases_than_those_for_users():
    users = requirements(*RUNTIME)
    for extra in SETUP["options.extras_require"]:
        for name, requirement in requirements(extra).items():
            if name in users:
                assert requirement.specifier == users[name].specifier, (extra, name)


def imported(folder: str) -> set[str]:
    """The distributions that the code in a folder of the checkout imports."""
    names = set()
    # a script that builds another distribution, of the kernels, asks for what it needs itself
    for path in (path for path in (ROOT / folder).rglob("*.py") if path.name != "setup.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
                names.add(ast.literal_eval(node.args[0]).partition(".")[0])
    foreign = names - set(sys.stdlib_module_names) - {"optimum_dsa", "tests"}
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in foreign}


def test_everything_that_is_imported_is_asked_for():
    # triton comes with torch where that has CUDA; transformers chooses the release of tokenizers, asks for gguf
    # where a GGUF is read; datasets is made of pyarrow and pandas, matplotlib of pillow; all draw with tqdm
    brought = {"triton", "tokenizers", "gguf", "pyarrow", "pandas", "pillow", "tqdm"}
    assert {"numpy", "markupsafe", "torch"} <= imported("optimum_dsa") - brought <= requirements(*RUNTIME).keys()
    assert {"pytest", "markdown-it-py"} <= imported("tests") - brought <= requirements("tests").keys()


def test_python_is_the_same_everywhere():
    lowest = SETUP["options"]["python_requires"].removeprefix(">=")
    target = f'target-version = "py{lowest.replace(".", "")}"\n'
    assert target in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"Python {lowest} or later" in (ROOT / "docs/source/installation.md").read_text(encoding="utf-8")


def test_the_page_lists_what_is_supported_and_every_fence():
    page = (ROOT / "docs/source/dependencies.md").read_text(encoding="utf-8")
    asked, pinned = requirements(*RUNTIME), pins("constraints.txt")
    for name, requirement in asked.items():
        row = rf"\| {re.escape(name)} \| {re.escape(str(bound(requirement)))}[^|]*\| {re.escape(str(pinned[name]))} \|"
        assert re.search(row, page), row
    for fence in FENCES.values():
        row = f"| {fence.package} | {fence.touched} | {fence.where} | {fence.reason} | {fence.test} |"
        assert row.replace("_", r"\_") in page or row in page, row
