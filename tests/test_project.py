"""The files around the code say what is there: workflows, hooks, citation, changelog, and what is packed."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import optimum_dsa


ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def commands(job: dict) -> list[str]:
    """The lines that a job runs, one for every value of its matrix."""
    lines = [line.strip() for step in job["steps"] for line in step.get("run", "").splitlines()]
    for name, values in job.get("strategy", {}).get("matrix", {}).items():
        key = f"${{{{ matrix.{name} }}}}"
        lines = [line.replace(key, value) for line in lines for value in (values if key in line else [""])]
    return lines


def combinations(job: dict) -> set[tuple[str, str]]:
    """(make's target, Python) of a job's matrix."""
    matrix = job["strategy"]["matrix"]
    out = {(row["versions"], row["python"]) for row in matrix["exclude"]}
    return {(versions, python) for versions in matrix["versions"] for python in matrix["python"]} - out


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_exists(path):
    targets = set(" ".join(re.findall(r"^([\w -]+):(?!=)", read("Makefile"), re.MULTILINE)).split())
    ran = [line for job in jobs(path).values() for line in commands(job)]
    assert ran and not any("matrix." in line for line in ran)
    for line in ran:
        program, *rest = line.split()
        if program == "make":
            assert rest[0] in targets, line
        elif program.startswith(".ci/"):
            assert os.access(ROOT / program, os.X_OK), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_read_and_no_more_than_publishing_needs(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert "permissions" not in job or (name, job["permissions"]) == ("publish", {"id-token": "write"})
        assert "permissions" not in job or "vars.PUBLISH == 'true'" in job["if"]  # never by itself


def test_oldest_pinned_and_newest_are_tested_on_each_python_that_they_allow():
    found = combinations(jobs(ROOT / ".github" / "workflows" / "test.yml")["test"])
    newer = {(versions, python) for versions in ("test", "test-newest") for python in ("3.11", "3.12", "3.13")}
    assert found == newer | {("test-oldest", python) for python in ("3.10", "3.11", "3.12", "3.13")}


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_templates_are_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert ids and len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in form["body"])


def test_hooks_run_the_ruff_that_make_quality_runs():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    for hook in hooks:
        assert hook["additional_dependencies"] == SETUP["options.extras_require"]["quality"].split()


def test_the_citation_names_this_version_and_nobody_who_is_invented():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "The optimum-dsa contributors"}]
    assert citation["version"] == optimum_dsa.__version__ and citation["license"] == SETUP["metadata"]["license"]
    (paper,) = citation["references"]
    cited = re.search(r"author\s+= \{(.*?)\}", read("README.md"), re.DOTALL)[1]
    names = [f"{person['family-names']}, {person['given-names']}" for person in paper["authors"]]
    assert names == re.split(r"\s+and\s+", cited)


def test_the_changelog_has_this_version_below_what_is_to_come():
    titles = re.findall(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert titles[0] == "Unreleased" and optimum_dsa.__version__ in titles
    kinds = set(re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_no_file_gives_an_address_that_does_not_exist():
    """No mail, and no page of this project: it has none yet."""
    names = (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CITATION.cff",
        "setup.cfg",
        "pyproject.toml",
    )
    for name in names:
        assert not re.search(r"[\w.+-]+@[\w-]+\.\w+|github\.com/[\w-]+/optimum[-_]dsa", read(name)), name
    assert not {"url", "project_urls", "author_email"} & set(SETUP["metadata"])


def test_the_sdist_is_a_whole_checkout(tmp_path):
    """Every file that git knows is in it, so that it can be tested and built again."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("only in a checkout")
    build = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    copy = tmp_path / "copy"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=copy, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert set(listed.stdout.splitlines()) - names == set()
