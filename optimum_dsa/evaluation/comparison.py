"""Several models side by side: a table per protocol, with what each differs from the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from .measurement import Measurement, with_error


def comparison_table(results: Sequence[Measurement]) -> str:
    """One line per model: sparsity, perplexity and tasks, each with its standard error.

    Models that were measured by different protocols stand in tables of their own. Where a table's models met the same
    windows, it says how far each perplexity is from the first one's, with the standard error of that difference. Of a
    task's metrics, normalised accuracy is shown where there is one, else its first; the last column is the mean over
    the tasks, where there are several.
    """
    groups: dict[tuple, list[Measurement]] = {}
    for result in results:
        groups.setdefault((result.protocol, result.task_protocol), []).append(result)
    return "\n\n".join("\n".join([*_heading(group), *_lines(group)]) for group in groups.values())


def paired_difference(first: Measurement, other: Measurement) -> tuple[float, float] | None:
    """How much higher `other`'s perplexity is than `first`'s, and the standard error of that; `None` if not paired.

    What makes windows hard is the same for both models, and cancels: the error of the difference is much smaller than
    that of either perplexity. With mean losses m and losses x_w, it is that of the mean over the windows w of
    exp(m₂)·x₂w − exp(m₁)·x₁w, to which the difference of the exponentials is linear.
    """
    paired = first.protocol == other.protocol and first.protocol is not None and first.protocol.fingerprint
    if not paired or len(first.losses) != len(other.losses) or len(first.losses) < 2:
        return None
    scale, base = (math.exp(min(fmean(one.losses), 700)) for one in (other, first))
    changes = [scale * there - base * here for there, here in zip(other.losses, first.losses)]
    mean, count = fmean(changes), len(changes)
    return scale - base, math.sqrt(sum((change - mean) ** 2 for change in changes) / (count - 1) / count)


def _heading(group: Sequence[Measurement]) -> list[str]:
    """What the table's numbers were measured on."""
    first, lines = group[0], []
    if first.protocol is not None:
        lines.append(f"perplexity on {first.protocol}")
    if first.task_protocol is not None:
        lines.append(f"tasks: {first.task_protocol}")
    if any(paired_difference(first, other) for other in group[1:]):
        lines.append(f"difference to {first.model}, with its standard error over the windows that both met")
    return lines


def _lines(group: Sequence[Measurement]) -> list[str]:
    tasks = list(dict.fromkeys(task for result in group for task in result.tasks))
    columns = {"model": [result.model for result in group], "sparsity": [f"{row.sparsity:.4f}" for row in group]}
    if any(result.perplexity is not None for result in group):
        columns["perplexity"] = [with_error(result.perplexity, result.perplexity_error, 3) for result in group]
    differences = [None, *(paired_difference(group[0], other) for other in group[1:])]
    if any(differences):
        columns["difference"] = [f"{found[0]:+.3f} ± {found[1]:.3f}" if found else "" for found in differences]
    values = {task: [_value(group, result, task) for result in group] for task in tasks}
    for task, found in values.items():
        columns[f"{task} ({main_metric(group, task)})"] = [with_error(*pair, 4) for pair in found]
    if len(tasks) > 1:
        rows = [[found[row][0] for found in values.values()] for row in range(len(group))]
        columns["mean"] = ["" if None in row else f"{fmean(row):.4f}" for row in rows]
    widths = {head: max(map(len, [head, *cells])) for head, cells in columns.items()}
    head, *cells = zip(*([head, *column] for head, column in columns.items()))
    first, *others = widths.values()
    return [
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others))]).rstrip()
        for line in (head, *cells)
    ]


def main_metric(results: Sequence[Measurement], task: str) -> str:
    """The metric of a task that tables show."""
    metrics = next(result.tasks[task] for result in results if task in result.tasks)
    return next((metric for metric in ("acc_norm", "acc", "exact_match") if metric in metrics), next(iter(metrics)))


def _value(results: Sequence[Measurement], result: Measurement, task: str) -> tuple[float | None, float | None]:
    found = result.tasks.get(task, {}).get(main_metric(results, task))
    return (None, None) if found is None else (found["value"], found["error"])
