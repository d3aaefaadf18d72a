"""Several models side by side: a table per protocol, with what each differs from the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from .measurement import Measurement, with_error


FEW = 12  # tasks of a group that stand in columns of their own


def comparison_table(results: Sequence[Measurement]) -> str:
    """One line per model: sparsity, perplexity and tasks, each with its standard error.

    Models that were measured by different protocols stand in tables of their own. Where a table's models met the same
    windows, it says how far each perplexity is from the first one's, with the standard error of that difference. Of a
    task's metrics, the one that its group is of is shown, else normalised accuracy where there is one, else its first.
    The last column is the mean over the tasks that are in no group, where there are several: a group is one already.
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
    tasks = shown_tasks(group)
    columns = {"model": [result.model for result in group], "sparsity": [f"{row.sparsity:.4f}" for row in group]}
    if any(result.perplexity is not None for result in group):
        columns["perplexity"] = [with_error(result.perplexity, result.perplexity_error, 3) for result in group]
    differences = [None, *(paired_difference(group[0], other) for other in group[1:])]
    if any(differences):
        columns["difference"] = [f"{found[0]:+.3f} ± {found[1]:.3f}" if found else "" for found in differences]
    values = {task: [_value(group, result, task) for result in group] for task in tasks}
    for task, found in values.items():
        columns[f"{task} ({main_metric(group, task)})"] = [with_error(*pair, 4) for pair in found]
    grouped = {name for result in group for one, members in result.groups.items() for name in (one, *members)}
    single = [found for task, found in values.items() if task not in grouped]
    if len(single) > 1:
        columns["mean"] = [with_error(*_mean([found[row] for found in single]), 4) for row in range(len(group))]
    widths = {head: max(map(len, [head, *cells])) for head, cells in columns.items()}
    head, *cells = zip(*([head, *column] for head, column in columns.items()))
    first, *others = widths.values()
    return [
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others))]).rstrip()
        for line in (head, *cells)
    ]


def shown_tasks(results: Sequence[Measurement]) -> list[str]:
    """The tasks that a table has a column for: of a group of many, such as the 57 of MMLU, the group alone."""
    groups = {name: members for result in results for name, members in result.groups.items()}
    many = {task for members in groups.values() if len(members) > FEW for task in members}
    # groups of one of them, such as MMLU's four fields, are left out as well
    large = [set(members) for members in groups.values() if len(members) > FEW]
    many |= {name for name, members in groups.items() if any(set(members) < others for others in large)}
    return [task for task in dict.fromkeys(task for one in results for task in one.tasks) if task not in many]


def main_metric(results: Sequence[Measurement], task: str) -> str:
    """The metric of a task that tables show."""
    metrics = next(result.tasks[task] for result in results if task in result.tasks)
    for result in results:
        of_group = [result.tasks[name] for name, members in result.groups.items() if task in members]
        if found := [metric for group in of_group for metric in group if metric in metrics]:
            return found[0]
    return next((metric for metric in ("acc_norm", "acc", "exact_match") if metric in metrics), next(iter(metrics)))


def _value(results: Sequence[Measurement], result: Measurement, task: str) -> tuple[float | None, float | None]:
    found = result.tasks.get(task, {}).get(main_metric(results, task))
    return (None, None) if found is None else (found["value"], found["error"])


def _mean(values: Sequence[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    """The mean of values and its standard error, the values being independent; `None` where one of them is missing."""
    if any(value is None for value, _ in values):
        return None, None
    errors = [error for _, error in values]
    error = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return fmean(value for value, _ in values), error
