"""The rooms of the package: who may import whom, and how long things are. The script in examples/ measures it."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "structure.py"


def measure(package):
    return subprocess.run([sys.executable, SCRIPT, str(package)], capture_output=True, text=True, timeout=60)


def test_the_structure_keeps_its_limits():
    done = measure(ROOT / "optimum_dsa")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines()[:5])
    assert lines["upward imports"].split()[0] == "0" and int(lines["floors"].split()[0]) > 5


@pytest.fixture
def package(tmp_path):
    """A package of two rooms, the upper of which imports the lower."""
    for room, text in (("common", "def f():\n    pass\n"), ("search", "from ..common.a import f\n\nf()\n")):
        (tmp_path / "p" / room).mkdir(parents=True)
        (tmp_path / "p" / room / "__init__.py").write_text("")
        (tmp_path / "p" / room / "a.py").write_text(text)
    (tmp_path / "p" / "__init__.py").write_text("")
    return tmp_path / "p"


def test_a_small_package_keeps_them(package):
    assert measure(package).returncode == 0


@pytest.mark.parametrize(
    "file,text,said",
    [
        ("common/b.py", "def g():\n    from ..search.a import f\n    f()\n", "p.search.a <- p.common.b"),
        ("elsewhere.py", "from .common.a import f\n", "p.common.a <- p.elsewhere"),
        ("common/b.py", "x = 1\n" * 401, "401  of at most 400   TOO MANY  p.common.b"),
        ("common/b.py", "def g():\n" + "    x = 1\n" * 80, "81  of at most 80   TOO MANY  p.common.b.g"),
    ],
)
def test_what_breaks_a_limit_is_named(package, file, text, said):
    (package / file).write_text(text)
    done = measure(package)
    assert done.returncode == 1 and said in done.stdout, done.stdout


def test_an_import_for_types_alone_is_none(package):
    (package / "common" / "b.py").write_text(
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from ..search.a import f\n"
    )
    assert measure(package).returncode == 0
