"""A file of measurements: what `evaluate --output` writes and `--json` prints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_text
from ..common.manifest import record
from ..common.versions import versions
from .measurement import Measurement


def results_json(results: Sequence[Measurement]) -> str:
    """The measurements, and the versions of what made them, as JSON: a line per model."""
    rows = ",\n  ".join(json.dumps(result.to_dict()) for result in results)
    return f'{{"models": [\n  {rows}\n], "versions": {json.dumps(versions())}}}'


def results_from(data: Any) -> list[Measurement]:
    """The measurements in `results_json`'s content; also in what version 0.1 printed: one row, or a list of rows.

    Raises:
        ValueError: it holds something else.
    """
    rows = data["models"] if isinstance(data, Mapping) and "models" in data else data
    rows = [rows] if isinstance(rows, Mapping) else rows
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError("Expected measurements: {'models': [...]} as optimum-cli dsa evaluate writes them.")
    return [Measurement.from_dict(row) for row in rows]


def read_results(path: str | Path) -> list[Measurement]:
    """The measurements in a file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        return results_from(read_json(Path(path)))
    except ValueError as error:
        raise ValueError(f"{path} holds no measurements: {error}") from None


def save_results(path: str | Path, results: Sequence[Measurement]) -> None:
    """Write the measurements to a file that holds nothing else."""
    check_results(path)
    write_text(Path(path), results_json(results) + "\n")
    record(Path(path))


def check_results(path: str | Path) -> None:
    """Raise `OSError` where results cannot be written to `path`, or would replace something else than results."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            found = read_json(path)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"models", "versions"} <= found.keys():
            raise FileExistsError(f"{path} exists and holds no results of optimum-dsa; choose another file.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no right to write to {path.parent}.")
