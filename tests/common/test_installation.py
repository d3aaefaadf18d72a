"""What is said of installing works from a checkout, and is said in one place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from optimum_dsa.common import installation
from optimum_dsa.common.installation import how_to_install, how_to_upgrade, install_line


ROOT = Path(__file__).resolve().parents[2]
# This package asked of an index by its name: "pip install optimum-dsa", 'pip install -U "optimum_dsa[plots]==0.1"',
# and "install optimum-dsa[peft]"; not a wheel's file name, nor prose that goes on: "install optimum-dsa from a wheel".
FROM_AN_INDEX = re.compile(
    r"""pip3?\s+install\s+(?:[^\s`]+\s+)*?['"]?optimum[-_]dsa(?![\w./-]*(?:whl|/))|install\s+['"]?optimum[-_]dsa\["""
)
LINE = re.compile(r"python -m pip install (?:--editable )?[\"']?\.(?:\[[\w,]+\])?[\"']?")


def texts() -> dict[str, str]:
    """Everything that a user may read: the package, its templates, pages, examples and the files beside them."""
    found = [path for folder in ("optimum_dsa", "docs", "examples", ".github") for path in (ROOT / folder).rglob("*")]
    found += [path for path in ROOT.iterdir() if path.suffix in (".md", ".cfg", ".cff")]
    kinds = (".py", ".md", ".html", ".json", ".yml", ".cfg", ".cff")
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in found if path.suffix in kinds}


def test_nothing_claims_that_an_index_has_this_package():
    found = texts()
    expected = {"README.md", "optimum_dsa/checkpoint/convert.py", "optimum_dsa/sharing/templates/model_card.md"}
    assert expected <= found.keys()
    claims = {name: match[0] for name, text in found.items() if (match := FROM_AN_INDEX.search(text))}
    assert not claims


@pytest.mark.parametrize(
    "text",
    [
        "pip install optimum-dsa",
        "`python -m pip install --upgrade optimum-dsa`",
        "pip install 'optimum-dsa[plots]'",
        'pip3 install -U "optimum_dsa==0.1.0"',
        "needs peft; install optimum-dsa[peft]",
    ],
)
def test_the_claim_is_recognised(text):
    assert FROM_AN_INDEX.search(text)


@pytest.mark.parametrize(
    "text",
    [
        install_line(),
        install_line("plots"),
        how_to_install("peft"),
        how_to_upgrade(),
        "pip install trackio",
        "pip install ./optimum_dsa-0.1.0-py3-none-any.whl",
        "pip install /home/me/optimum-dsa/",
        "`python -m pip install .` in a checkout of optimum-dsa",
        "install optimum-dsa from a wheel or a whole checkout",
    ],
)
def test_what_works_is_no_claim(text):
    assert not FROM_AN_INDEX.search(text)


def test_the_pages_show_the_line_of_the_package():
    shown = {line for name, text in texts().items() if name.endswith(".md") for line in LINE.findall(text)}
    assert install_line() in shown and install_line("plots") in shown


def test_one_constant_changes_the_line(monkeypatch):
    assert "in a checkout" in how_to_install("plots") and "in a newer checkout" in how_to_upgrade()
    monkeypatch.setattr(installation, "TARGET", "example-name")
    assert how_to_install("plots") == "`python -m pip install 'example-name[plots]'`"
    assert how_to_upgrade() == "`python -m pip install --upgrade example-name`"
