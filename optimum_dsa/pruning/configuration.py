"""`DSAConfig`: everything that decides a pruned model, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_text
from ..common.installation import how_to_upgrade
from ..common.registry import near
from ..common.values import is_number
from ..model.statistics import DAMPING
from .allocation import ALLOCATIONS, Allocation, AllocationFunction, Allocator
from .unstructured.methods import METHODS, Method
from .unstructured.metrics import METRICS
from .unstructured.patterns import Pattern
from .unstructured.updates import UPDATES


CONFIG_NAME = "dsa_config.json"
FORMAT_VERSION = 2  # of that file


@dataclass(frozen=True)
class DSAConfig:
    """How to prune a model. Checked when it is made; a wrong value raises `ValueError` or `UnknownNameError`.

    Args:
        sparsity (`float`): Share of the prunable weights to remove, in [0, 1).
        method (`str`, defaults to `"wanda"`): A row of `METHODS`: metric, pattern and update.
        allocation (`str` or [`Allocation`], defaults to `"dsa"`): A row of `ALLOCATIONS`, an allocation function such
            as `"abslog/var/atan,asin/no_op@+0.08"` or `"W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)"`, an [`Allocation`], or the
            path of one as JSON or of a pruned model.
        spread (`float`, *optional*): Half the distance between the most and the least pruned unit. Defaults to the
            allocation's own.
        pattern (`str`, *optional*): `"row"`, `"matrix"`, `"group:128"`, `"2:4"` (any N:M) or `"mixed:8"`. Defaults to
            the method's.
        update (`str`, *optional*): A row of `UPDATES`. Defaults to the method's.
        granularity (`str`, defaults to `"block"`): One sparsity per `"block"` or per `"matrix"`. An allocation that
            exists per matrix only (`er`, `er_plus`) is computed per matrix.
        sequential (`bool`, defaults to `True`): Whether each block is calibrated on the outputs of the pruned blocks
            before it.
        num_samples (`int`, defaults to 128): Sequences to take from a text source.
        sequence_length (`int`, *optional*): Tokens per sequence. Defaults to the model's longest, at most 2048.
        text_column (`str`, defaults to `"text"`): The column of a dataset that holds the text.
        split (`str`, *optional*): The split of a named dataset. Defaults to `"train"`.
        seed (`int`, defaults to 0): Which sequences are taken.
        exclude (`tuple[str, ...]`): Names or glob patterns of weights to leave dense.
        include (`tuple[str, ...]`): Names of matrices outside the blocks to prune as well, such as `"lm_head"`.
        blocks (`tuple[str, ...]`): Names of the module lists to prune instead of the ones that are found.
        skip_unprunable (`bool`): Leave dense what cannot be pruned, instead of refusing the model.
        metric (`str`, *optional*): A row of `METRICS` instead of the method's.
        allocation_metric (`str`, defaults to `"wanda"`): The scores from which the allocation is computed.
        min_sparsity (`float`, defaults to 0.0): The least that any unit is pruned.
        max_sparsity (`float`, defaults to 0.99): The most that any unit is pruned.
        damping (`float`, defaults to 0.01): Share of mean diag(X·Xᵀ) added to it before it is inverted.
        batch_size (`int`, defaults to 8): Sequences per forward pass. It does not change the result.
    """

    sparsity: float
    method: str = "wanda"
    allocation: str | Allocation = "dsa"
    spread: float | None = None
    pattern: str | None = None
    update: str | None = None
    granularity: str = "block"
    sequential: bool = True
    num_samples: int = 128
    sequence_length: int | None = None
    text_column: str = "text"
    split: str | None = None
    seed: int = 0
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    skip_unprunable: bool = False
    metric: str | None = None
    allocation_metric: str = "wanda"
    min_sparsity: float = 0.0
    max_sparsity: float = 0.99
    damping: float = DAMPING
    batch_size: int = 8

    def __post_init__(self):
        for name in ("exclude", "include", "blocks"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} is a list of names, got {value!r}; write {name}=['{value}'].")
            object.__setattr__(self, name, tuple(value))
        if not is_number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is the share of weights to remove, in [0, 1); got {self.sparsity!r}.")
        for name in ("num_samples", "batch_size", "sequence_length"):
            value = getattr(self, name)
            if not (value is None and name == "sequence_length") and not (_whole(value) and value >= 1):
                raise ValueError(f"{name} is a whole number of at least 1, got {value!r}.")
        if not _whole(self.seed) or self.seed < 0:
            raise ValueError(f"seed is a whole number of at least 0, got {self.seed!r}.")
        if self.spread is not None and not (is_number(self.spread) and 0 <= self.spread <= 1):
            raise ValueError(f"spread is a half-width in [0, 1], got {self.spread!r}.")
        if not (is_number(self.damping) and self.damping >= 0):
            raise ValueError(f"damping is at least 0, got {self.damping!r}.")
        for name in ("min_sparsity", "max_sparsity"):
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name} is in [0, 1], got {getattr(self, name)!r}.")
        if not self.min_sparsity <= self.sparsity <= self.max_sparsity:
            raise ValueError(
                f"A sparsity of {self.sparsity} cannot be met with every unit in [{self.min_sparsity}, "
                f"{self.max_sparsity}]; widen min_sparsity / max_sparsity or change the sparsity."
            )
        if self.granularity not in ("block", "matrix"):
            raise ValueError(f"granularity is 'block' or 'matrix', got {self.granularity!r}.")
        for name in ("sequential", "skip_unprunable"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is true or false, got {getattr(self, name)!r}.")
        names = {"method": False, "allocation_metric": False, "text_column": False}
        for name, optional in (names | {"metric": True, "update": True, "split": True}).items():
            value = getattr(self, name)
            if not (isinstance(value, str) or (value is None and optional)):
                raise ValueError(f"{name} is a name, got {value!r}.")
        METHODS[self.method], METRICS[self.allocation_metric], METRICS[self.recipe.metric], UPDATES[self.recipe.update]
        _ = self.allocator  # an unknown allocation is an error here
        if not isinstance(self.recipe.pattern, str):
            raise ValueError(f"pattern is a text such as '2:4', got {self.pattern!r}.")
        self._check_pattern(Pattern.parse(self.recipe.pattern))

    def _check_pattern(self, pattern: Pattern) -> None:
        if pattern.sparsity is None:
            return
        if not math.isclose(pattern.sparsity, self.sparsity, abs_tol=1e-6):
            raise ValueError(
                f"Pattern {pattern} removes {pattern.sparsity:.4g} of every matrix, but the sparsity asked for is "
                f"{self.sparsity}; use sparsity={pattern.sparsity:.4g} or pattern='mixed:{pattern.width}'."
            )
        if self.allocation != "uniform":
            raise ValueError(
                f"Pattern {pattern} gives every matrix the same sparsity, so there is nothing to allocate; "
                f"use allocation='uniform', or pattern='mixed:{pattern.width}' to let N differ."
            )

    @property
    def recipe(self) -> Method:
        """Metric, pattern and update: the method's row with what this config replaces in it."""
        row = METHODS[self.method]
        return Method(self.metric or row.metric, self.pattern or row.pattern, self.update or row.update)

    @property
    def allocator(self) -> Allocator | None:
        """What computes the allocation; `None` where it is given."""
        name = self.allocation
        if isinstance(name, Allocation):
            return None
        if not isinstance(name, str):
            raise ValueError(f"allocation is a name, an allocation function, a path or an Allocation, got {name!r}.")
        if name in ALLOCATIONS:
            return ALLOCATIONS[name]
        if _exists(name):
            return None
        if name.endswith(".json"):
            raise FileNotFoundError(f"No allocation file {name!r}.")
        if "/" in name or name.upper().startswith("W:"):
            return AllocationFunction.parse(name)
        return ALLOCATIONS[name]

    @property
    def unit_granularity(self) -> str:
        """The granularity of the units: the config's, or the only one at which the allocator exists."""
        return getattr(self.allocator, "granularity", None) or self.granularity

    def given_allocation(self) -> Allocation:
        """The allocation where `allocator` is `None`."""
        return self.allocation if isinstance(self.allocation, Allocation) else Allocation.load(self.allocation)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data |= {name: list(data[name]) for name in ("exclude", "include", "blocks")}
        if isinstance(self.allocation, Allocation):
            data["allocation"] = self.allocation.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DSAConfig:
        """The config in `to_dict`'s form; an unknown key raises `ValueError`."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"DSAConfig has no {key!r}.{near(key, known)} Known: {', '.join(known)}.")
        if "sparsity" not in data:
            raise ValueError("DSAConfig needs a 'sparsity'.")
        data = dict(data)
        if isinstance(data.get("allocation"), Mapping):
            data["allocation"] = Allocation.from_dict(data["allocation"])
        return cls(**data)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `dsa_config.json` with this config into `directory`; never over that of a pruned model."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        file = Path(directory) / CONFIG_NAME
        if file.exists() and not _holds_config(file):
            raise FileExistsError(f"{file} is not a saved DSAConfig alone; choose another folder.")
        data = {"format_version": FORMAT_VERSION, "config": self.to_dict()}
        write_text(file, json.dumps(data, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DSAConfig:
        """The config in a `dsa_config.json`, or in the folder that holds one: a saved config's or a pruned model's."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        data = read_json(path)
        if not isinstance(data, Mapping) or not isinstance(data.get("config", data), Mapping):
            raise ValueError(f"{path} holds no DSAConfig.")
        version = data.get("format_version", 1)
        if not _whole(version) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"{path} has version {version!r} of the format, and this optimum-dsa knows up to {FORMAT_VERSION}; "
                f"upgrade it with {how_to_upgrade()}."
            )
        given = data.get("config") or {name: value for name, value in data.items() if name != "format_version"}
        return cls.from_dict(given)


def _holds_config(file: Path) -> bool:
    """Whether a file holds what `DSAConfig.save_pretrained` writes, and nothing else."""
    try:
        data = read_json(file)
    except ValueError:
        return False
    return isinstance(data, Mapping) and data.keys() == {"format_version", "config"}


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # no path at all: too long, or with a zero byte
        return False


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
