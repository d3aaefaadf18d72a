"""Outcomes as tables: the same rows in a terminal, on a page and in a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.description import seal_of
from ..checkpoint.verify import SEALS
from ..common.columns import columns
from ..common.escaping import inline_markdown, one_line, table_cell, visible
from ..evaluation.comparison import main_metric, paired_difference, shown_tasks
from ..evaluation.measurement import Measurement, Protocol, TaskProtocol, with_error
from ..pruning.allocation import Allocation
from ..pruning.allocation.layout import by_block, place
from ..pruning.structured.described import by_kind, parameters_before
from .benefit import benefits
from .charts import Measured, readable_bytes
from .outcome import Outcome, last_part


BARS = " ▏▎▍▌▋▊▉█"
LIMITS = (
    "A pruned model is a dense model in which many numbers are zero. By itself it is neither faster nor smaller in "
    "memory than before. Speed needs kernels for sparse weights, which are few. "
)
DENSE_FILES = "Its files are as large as the dense model's; they can be compressed."
SMALLER = (
    "It is a smaller model of its class: fewer multiplications, smaller files and less memory, without any kernel. "
    "How much faster it is depends on machine and sizes, which optimum-cli dsa bench measures. "
)
ITS_ZEROS = (
    "The zeros in what is left make it neither faster nor smaller in memory by themselves: that needs kernels for "
    "sparse weights, which are few. "
)
SMALLER_FILES = "Its files hold them like other numbers; they can be compressed."
COMPRESSED_FILES = "Its files leave the zeros out; they come back when it is loaded."


_NAMED = 12  # files or parts of a model in a sentence


def limits(outcome: Outcome) -> str:
    """What sparsity and smaller matrices give and do not give, in a paragraph."""
    if outcome.is_only_cut:
        return SMALLER.strip()
    zeros, files = (SMALLER + ITS_ZEROS, SMALLER_FILES) if outcome.structured else (LIMITS, DENSE_FILES)
    return zeros + (COMPRESSED_FILES if outcome.compressed else files)


def of_the_base(outcome: Outcome, shared: bool = False) -> str:
    """What of the base is not with the model, and what of it was not pruned: a text of names from its files.

    With `shared`, for others to read: without the names of files in a folder of whoever pruned it.
    """
    found = outcome.facts.get("base_files") or {}
    public = bool((outcome.facts.get("base_model") or {}).get("revision"))
    parts = []
    if (left := found.get("left")) and (public or not shared):
        shown = ", ".join(f"{name} ({why})" for name, why in list(left.items())[:_NAMED])
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        parts.append(f"Files of the base that are not here: {shown}{more}.")
    said = {"not_pruned": "Not pruned, as", "not_kept": "Of the base and not here, as"}
    for name, what in said.items():
        if tensors := found.get(name):
            parts.append(
                f"{what} the model's class does not know them: {sum(tensors.values()):,} weights in "
                f"{', '.join(list(tensors)[:_NAMED])}{', ...' if len(tensors) > _NAMED else ''}."
            )
    return " ".join(parts)


def vouched(outcomes: Sequence[Outcome]) -> str:
    """What stands behind the figures of pruned models: files that say so; empty where there are only searches."""
    models = [outcome for outcome in outcomes if outcome.achieved]
    if not models:
        return ""
    seals = [(model.name, seal_of(model.facts)) for model in models]
    changed = [f" {one_line(name)}: {SEALS[seal]}." for name, seal in seals if seal in SEALS]
    return (
        "Figures are as the files beside the model say, and were not counted or measured again; "
        f"optimum-cli dsa verify counts the zeros.{''.join(changed)}"
    )


@dataclass(frozen=True)
class Table:
    """A head and rows of text; `print` aligns them, `markdown` is for a card."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        return "\n".join(columns([[*map(one_line, line)] for line in (self.header, *self.rows)]))

    def markdown(self) -> str:
        """A table of GitHub's Markdown; numbers to the right, texts shown letter by letter."""
        head, *rows = ([table_cell(inline_markdown(cell)) for cell in line] for line in (self.header, *self.rows))
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def percent(share: float | None) -> str:
    """A share as 60.00%; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.2f}%"


@dataclass(frozen=True)
class Row:
    """A line of the tables: an outcome, or the dense model that one is from.

    Attributes:
        name: as shown.
        outcome: `None` of a dense model that is known by what was measured of it, or by its name alone.
        measurements: of this model.
    """

    name: str
    outcome: Outcome | None
    measurements: Sequence[Measurement] = ()

    def on(self, protocol: Protocol | None) -> Measurement | None:
        """The perplexity that was measured by `protocol`."""
        return next((found for found in self.measurements if found.protocol == protocol), None)


def model_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row per model, after one for each dense model that any of them is from."""
    parents: dict[str, list[Measurement]] = {}
    models = [outcome for outcome in outcomes if outcome.achieved or outcome.is_dense]
    for outcome in models:
        if outcome.achieved:
            name = outcome.base or (last_part(outcome.parent[0].model) if outcome.parent else "")
            known = parents.setdefault(name, [])
            known += [found for found in outcome.parent if found not in known]
    there = {outcome.name for outcome in models if outcome.is_dense}
    dense = [
        Row("dense" if name in ("", "dense") else f"{name} (dense)", None, found)
        for name, found in parents.items()
        if name not in there
    ]
    return [*dense, *(Row(outcome.name, outcome, outcome.evaluations) for outcome in models)]


def protocols(rows: Sequence[Row]) -> list[Protocol]:
    """What perplexities were measured on, each once; only equal ones are comparable."""
    found = [one.protocol for row in rows for one in row.measurements if one.perplexity is not None]
    return list(dict.fromkeys(protocol for protocol in found if protocol is not None))


def quality_table(outcomes: Sequence[Outcome]) -> Table:
    """A row per model, its dense parent first: what was removed, what it cost, how large the files are.

    A perplexity is in it where all were measured by one protocol.
    """
    rows = model_rows(outcomes)
    if not rows:
        return Table([], [])
    columns = {"model": [row.name for row in rows]}
    if any(row.outcome is not None and row.outcome.structured for row in rows):
        columns["parameters"] = [_parameters(row, outcomes) for row in rows]
    pruned = [row.outcome for row in rows if row.outcome is not None and not row.outcome.is_dense]
    if not pruned or not all(outcome.is_only_cut for outcome in pruned):
        columns["removed"] = [percent(_achieved(row, "sparsity")) for row in rows]
        columns["of all parameters"] = [percent(_achieved(row, "sparsity_of_all_parameters")) for row in rows]
    if len(found := protocols(rows)) == 1:
        columns |= _perplexities(rows, found[0])
    sizes = [row.outcome and row.outcome.bytes for row in rows]
    columns["weight files"] = ["–" if size is None else readable_bytes(size) for size in sizes]
    return _from_columns(columns)


def perplexity_tables(outcomes: Sequence[Outcome]) -> list[tuple[Protocol, Table]]:
    """A table per protocol: rows of two protocols cannot be compared."""
    rows = model_rows(outcomes)
    tables = []
    for protocol in protocols(rows):
        there = [row for row in rows if row.on(protocol)]
        tables.append(
            (protocol, _from_columns({"model": [row.name for row in there], **_perplexities(there, protocol)}))
        )
    return tables


def task_tables(outcomes: Sequence[Outcome]) -> list[tuple[TaskProtocol | None, Table]]:
    """A table per protocol of tasks: a row per model, a column per task."""
    groups: dict[TaskProtocol | None, list[tuple[str, Measurement]]] = {}
    for row in model_rows(outcomes):
        for found in row.measurements:
            if found.tasks:
                groups.setdefault(found.task_protocol, []).append((row.name, found))
    tables = []
    for protocol, group in groups.items():
        found = [measurement for _, measurement in group]
        columns = {"model": [name for name, _ in group]}
        for task in shown_tasks(found):
            metric = main_metric(found, task)
            values = [one.tasks.get(task, {}).get(metric, {"value": None, "error": None}) for one in found]
            columns[f"{task} ({metric})"] = [with_error(one["value"], one["error"], 4) or "–" for one in values]
        tables.append((protocol, _from_columns(columns)))
    return tables


def _parameters(row: Row, outcomes: Sequence[Outcome]) -> str:
    """How many a model has; a dense one as many as what was cut out of it had before."""
    if row.outcome is not None and row.outcome.achieved:
        return f"{row.outcome.achieved['parameters']:,}"
    cut = [one for one in outcomes if one.structured]
    of = [one for one in cut if row.name in ((one.base, f"{one.base} (dense)") if one.base else ("dense",))]
    return f"{parameters_before(of[0].structured):,}" if of else "–"


def width_table(outcome: Outcome) -> Table:
    """A row per block: how many structures of every kind stay, of how many."""
    kinds = by_kind(outcome.widths)
    blocks = list(dict.fromkeys(block for one in kinds.values() for block in one))
    rows = [
        [block, *(f"{one[block][0]:,} of {one[block][1]:,}" if block in one else "–" for one in kinds.values())]
        for block in blocks
    ]
    return Table(["block", *kinds], rows)


def _achieved(row: Row, name: str) -> float | None:
    """A share of a model: of a dense one, nothing was removed."""
    return row.outcome.achieved.get(name) if row.outcome is not None and not row.outcome.is_dense else 0.0


def _perplexities(rows: Sequence[Row], protocol: Protocol) -> dict[str, list[str]]:
    """Columns: perplexity with its standard error, and the paired difference to the first that was measured."""
    found = [row.on(protocol) for row in rows]
    columns = {"perplexity": [with_error(one.perplexity, one.perplexity_error, 2) if one else "–" for one in found]}
    first = next((number for number, one in enumerate(found) if one), 0)
    pairs = [one and number > first and paired_difference(found[first], one) for number, one in enumerate(found)]
    if any(pairs):
        shown = [f"{pair[0]:+.2f} ± {pair[1]:.2f}" if pair else "–" for pair in pairs]
        columns["difference"] = shown
    return columns


def _from_columns(columns: Mapping[str, Sequence[str]]) -> Table:
    return Table(list(columns), [list(row) for row in zip(*columns.values())])


def measured(outcomes: Sequence[Outcome]) -> list[Measured]:
    """The rows of `quality_chart`: perplexities by the protocol that most were measured by."""
    rows = model_rows(outcomes)
    known = [one.protocol for row in rows for one in row.measurements if one.protocol is not None]
    common = max(known, key=known.count, default=None)
    drawn = []
    for row in rows:
        found = row.on(common) if common is not None else None
        value = found.perplexity if found and found.perplexity is not None else math.nan
        size = row.outcome.bytes if row.outcome is not None else None
        drawn.append(Measured(row.name, value if math.isfinite(value) else None, size))
    return [row for row in drawn if row.perplexity is not None or row.bytes is not None]


def finalists_table(outcome: Outcome) -> Table:
    """A row per finalist of a search, best first."""
    header = ["allocation", "validation loss", "perplexity", "proxy loss"]
    rows = []
    for row in outcome.facts.get("finalists", []):
        values = [row["validation_loss"], row.get("validation_perplexity"), row.get("proxy_loss")]
        shown = ["–" if value is None else f"{value:.{digits}f}" for value, digits in zip(values, (4, 2, 4))]
        rows.append([row["allocation"]["name"], *shown])
    return Table(header, rows)


def compared(outcomes: Sequence[Outcome]) -> dict[str, Allocation]:
    """Label -> allocation: of every outcome, then of the baselines that differ from them."""
    allocations = {outcome.name: outcome.allocation for outcome in outcomes if outcome.allocation is not None}
    blocks = set(by_block(next(iter(allocations.values())))) if allocations else set()
    for outcome in outcomes:
        for name, baseline in outcome.baselines.items():
            shares = by_block(baseline)
            if shares.keys() == blocks and not any(_alike(shares, by_block(other)) for other in allocations.values()):
                allocations.setdefault(name, baseline)
    return allocations


def _alike(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    """Whether nobody could tell two lines apart."""
    return all(abs(share - second.get(block, -1)) < 0.002 for block, share in first.items())


def block_table(allocations: Mapping[str, Allocation]) -> Table:
    """A row per block: its prunable weights, and the share that each allocation removes."""
    shares = {label: by_block(allocation) for label, allocation in allocations.items()}
    blocks = list(dict.fromkeys(block for values in shares.values() for block in values))
    sizes = block_sizes(next(iter(allocations.values())))
    rows = [
        [block, f"{sizes.get(block, 0):,}", *(percent(values.get(block)) for values in shares.values())]
        for block in blocks
    ]
    return Table(["block", "weights", *shares], rows)


def block_bars(allocations: Mapping[str, Allocation], bars: int = -1) -> str:
    """`block_table` as text, with the shares of one allocation, by its place, drawn as bars."""
    table = block_table(allocations)
    column = range(2, len(table.header))[bars]
    rows = [[*row, bar(percentage(row[column])).ljust(20)] for row in table.rows]
    return "\n".join(line.rstrip() for line in str(Table([*table.header, ""], rows)).splitlines())


def block_sizes(allocation: Allocation) -> dict[str, int]:
    """Block -> prunable weights in it."""
    sizes: dict[str, int] = {}
    for unit, size in allocation.sizes.items():
        block = place(unit).block
        sizes[block] = sizes.get(block, 0) + size
    return sizes


def result_tables(outcomes: Sequence[Outcome]) -> list[tuple[str, str, Table]]:
    """Heading, caption and table of what was measured."""
    found = []
    quality, known = quality_table(outcomes), protocols(model_rows(outcomes))
    if quality.rows:
        on = f"Perplexity on {known[0]}: lower is better. " if len(known) == 1 else ""
        if "difference" in quality.header:
            on += (
                f"The difference is to {quality.rows[0][0]}, with its standard error over the windows that both met. "
            )
        found.append(("In numbers", f"{on}{not_measured(outcomes)}".strip(), quality))
    for protocol, table in perplexity_tables(outcomes) if len(known) != 1 else []:
        found.append(("Perplexity", f"On {protocol}: lower is better, and only comparable on one text.", table))
    for protocol, table in task_tables(outcomes):
        found.append(("Tasks", f"Of lm-eval: {protocol}. Higher is better." if protocol else "Of lm-eval.", table))
    found += [(heading, caption, Table(header, rows)) for heading, caption, header, rows in benefits(outcomes)]
    for outcome in outcomes:
        finalists = finalists_table(outcome)
        if finalists.rows:
            heading = "Finalists" + (f" of {outcome.name}" if len(outcomes) > 1 else "")
            found.append(
                (heading, "Losses on validation text after the real, sequential prune, best first.", finalists)
            )
    return found


def not_measured(outcomes: Sequence[Outcome]) -> str:
    """How to measure what was not: a model, or the dense one that it is from; empty where all was."""
    rows = [row for row in model_rows(outcomes) if not row.measurements]
    if models := [row for row in rows if row.outcome is not None]:
        name, pruned = models[0].name, not models[0].outcome.is_dense
        dense, both = (" --dense DENSE", " and the dense model") if pruned else ("", "")
        line = f"optimum-cli dsa evaluate {name}{dense} --dataset FILE --output {name}/evaluation.json"
        return f"Not measured: {', '.join(row.name for row in rows)}. {line} measures it{both}."
    if rows:
        return f"Not measured: {rows[0].name}; optimum-cli dsa evaluate takes it as --dense."
    return ""


def terminal(outcomes: Sequence[Outcome]) -> str:
    """The tables as text."""
    parts = [
        f"{one_line(heading)}. {one_line(caption)}\n{table}" for heading, caption, table in result_tables(outcomes)
    ]
    parts += [f"What stays of {one_line(one.name)}\n{width_table(one)}" for one in outcomes if one.structured]
    if allocations := compared(outcomes):
        parts.append(block_bars(allocations, bars=0))
    elif outcomes[0].trace:
        losses = outcomes[0].trace.best_so_far()[1]
        best = f"best loss {losses[-1]:.4f}" if losses else "no candidate has met all windows yet"
        parts.append(
            f"{one_line(outcomes[0].name)}: a search under way, {len(outcomes[0].trace.trials)} trials, {best}"
        )
    return visible("\n\n".join(filter(None, [*parts, vouched(outcomes)])))


def percentage(text: str) -> float:
    """A share that `percent` wrote, in percent."""
    return float(text.rstrip("%")) if text != "–" else 0.0


def bar(value: float, width: int = 20) -> str:
    """A bar of `width` letters for 100."""
    eighths = round(value / 100 * width * 8)
    return "█" * (eighths // 8) + (BARS[eighths % 8] if eighths % 8 else "")
