"""The way of one family to its folders, and the fresh process that uses folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from optimum_dsa import DataConfig, DSAConfig, DSAPruner
from optimum_dsa.model.adapters import has_adapters

from ..tiny import LOADS_COMPRESSED
from . import uses
from .families import FAMILIES


CONFIG = DSAConfig(0.5, "wanda", "uniform", data=DataConfig(num_samples=4))
FORMS = ["dense", "compressed"] if LOADS_COMPRESSED else ["dense"]


@dataclass
class Way:
    """What came of the way of one family: where its folders are, and what was said of the model in memory."""

    base: Path
    out: dict[str, Path]
    pruner: DSAPruner
    expected: dict[str, Any]


def base_of(name: str, home: Path) -> Path:
    """The folder of a family as its users have it."""
    family, base = FAMILIES[name], home / "base" / name
    base.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    family.make(base)
    for file, content in family.files.items():
        (base / file).parent.mkdir(exist_ok=True)
        (base / file).write_text(content)
    return base


def walked(name: str, home: Path) -> Way:
    """Load, prune, save in every form."""
    base = base_of(name, home)
    pruner = pruned(name, base)
    out = {form: home / form / name for form in FORMS}
    for form, folder in out.items():
        folder.parent.mkdir(exist_ok=True)
        if has_adapters(pruner.model):
            pruner = pruned(name, base)  # whose first save is the model under them
            pruner.save_pretrained(folder.with_name(f"{name} base"), compressed=form == "compressed")
            pruner.save_pretrained(folder)
        else:
            pruner.save_pretrained(folder, compressed=form == "compressed")
    return Way(base, out, pruner, uses.facts(FAMILIES[name].use, base, pruner.model))


def pruned(name: str, base: Path) -> DSAPruner:
    family = FAMILIES[name]
    pruner = DSAPruner.from_pretrained(base, **family.options)
    pruner.prune(family.calibration(base), replace(CONFIG, **family.config))
    return pruner


def used(asked: Mapping[str, tuple[str, Path, str | None]], home: Path) -> dict[str, Any]:
    """Name -> what a fresh process found: `asked` has its use, its folder, and a module to import before."""
    given = json.dumps({name: [use, str(folder), needed] for name, (use, folder, needed) in asked.items()})
    environment = os.environ | {"HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-W", "ignore", uses.__file__, given]
    ran = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=home)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Class, every weight and every zero are equal, and what was said is, but for rounding."""
    assert "error" not in found, found["error"]
    assert _leaves(found["said"]) == [_close(leaf) for leaf in _leaves(expected["said"])]
    assert {**found, "said": None} == {**expected, "said": None}


def _leaves(value: Any) -> list:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list) else [value]


def _close(leaf: Any) -> Any:
    return pytest.approx(leaf, rel=1e-4, abs=1e-5) if isinstance(leaf, float) else leaf
