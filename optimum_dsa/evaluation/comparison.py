"""What was measured of one model, and several models side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_text
from ..common.manifest import record
from ..common.versions import versions


@dataclass(frozen=True)
class Measured:
    """Measurements of one model.

    Attributes:
        model (`str`): its folder or Hub id.
        sparsity (`float`): share of zeros in the prunable weights.
        size (`int`): number of prunable weights.
        perplexity (`float`): on the text in `text`, with its standard error `perplexity_error`; `None` without text.
        text (`Mapping[str, Any]`): name of the data, number of windows and their length.
        tasks (`Mapping[str, Mapping]`): task -> metric -> value and standard error.
    """

    model: str
    sparsity: float
    size: int
    perplexity: float | None = None
    perplexity_error: float | None = None
    text: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """One level of JSON values, the facts of the text among them; nothing of what was not measured."""
        data = asdict(self)
        text = data.pop("text")
        return {name: value for name, value in (data | text).items() if value not in (None, {})}


def save_results(path: str | Path, results: Sequence[Measured]) -> None:
    """Write the measurements, and the versions of what made them, as JSON."""
    check_results(path)
    content = {"models": [result.to_dict() for result in results], "versions": versions()}
    write_text(Path(path), json.dumps(content, indent=2) + "\n")
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


def comparison_table(results: Sequence[Measured]) -> str:
    """One line per model: sparsity, perplexity and tasks, each with its standard error.

    Of a task's metrics, normalised accuracy is shown where there is one, else its first; the last column is the mean
    over the tasks, where there are several.
    """
    tasks = list(dict.fromkeys(task for result in results for task in result.tasks))
    head = ["model", "sparsity"]
    head += ["perplexity"] if any(result.perplexity is not None for result in results) else []
    head += [f"{task} ({main_metric(results, task)})" for task in tasks]
    head += ["mean"] if len(tasks) > 1 else []
    lines = [head, *([*_cells(results, result, tasks, "perplexity" in head)] for result in results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    return "\n".join(texts)


def main_metric(results: Sequence[Measured], task: str) -> str:
    """The metric of a task that tables show."""
    metrics = next(result.tasks[task] for result in results if task in result.tasks)
    return next((metric for metric in ("acc_norm", "acc", "exact_match") if metric in metrics), next(iter(metrics)))


def _cells(results: Sequence[Measured], result: Measured, tasks: Sequence[str], perplexity: bool) -> list[str]:
    cells = [result.model, f"{result.sparsity:.4f}"]
    if perplexity:
        cells.append(_with_error(result.perplexity, result.perplexity_error, 3))
    values = []
    for task in tasks:
        found = result.tasks.get(task, {}).get(main_metric(results, task), {"value": None, "error": None})
        cells.append(_with_error(found["value"], found["error"], 4))
        values.append(found["value"])
    if len(tasks) > 1:
        cells.append("" if None in values else f"{sum(values) / len(values):.4f}")
    return cells


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")
