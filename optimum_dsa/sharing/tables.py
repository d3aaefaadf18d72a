"""Outcomes as tables: the same rows in a terminal, on a page and in a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.description import seal_of
from ..checkpoint.verify import SEALS
from ..common.escaping import inline_markdown, one_line, table_cell, visible
from ..pruning.allocation import Allocation
from ..pruning.allocation.layout import by_block, place
from .charts import Measured, readable_bytes
from .outcome import Outcome


BARS = " ▏▎▍▌▋▊▉█"
LIMITS = (
    "A pruned model is a dense model in which many numbers are zero. By itself it is neither faster nor smaller in "
    "memory than before. Speed needs kernels for sparse weights, which are few. "
)
DENSE_FILES = "Its files are as large as the dense model's; they can be compressed."
COMPRESSED_FILES = "Its files leave the zeros out; they come back when it is loaded."


def limits(outcome: Outcome) -> str:
    """What sparsity does and does not give, in a paragraph."""
    return LIMITS + (COMPRESSED_FILES if outcome.compressed else DENSE_FILES)


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
        lines = [[*map(one_line, line)] for line in (self.header, *self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
            for line in lines
        )

    def markdown(self) -> str:
        """A table of GitHub's Markdown; numbers to the right, texts shown letter by letter."""
        head, *rows = ([table_cell(inline_markdown(cell)) for cell in line] for line in (self.header, *self.rows))
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def percent(share: float | None) -> str:
    """A share as 60.00%; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.2f}%"


def measured_texts(outcomes: Sequence[Outcome]) -> list[tuple]:
    """What perplexities were measured on: (dataset, windows, length), each once; only equal ones are comparable."""
    return list(dict.fromkeys(text_of(row) for outcome in outcomes for row in outcome.evaluations))


def text_of(evaluation: Mapping[str, Any]) -> tuple:
    """What an evaluation was measured on."""
    return str(evaluation["dataset"]), evaluation.get("windows"), evaluation.get("sequence_length")


def describe_text(text: tuple) -> str:
    """A measured text in words."""
    dataset, windows, length = text
    return dataset if windows is None else f"{dataset}, {windows} windows of {length} tokens"


def quality_table(outcomes: Sequence[Outcome]) -> Table:
    """A row per pruned model: what was removed, what it cost, how large the files are."""
    texts = measured_texts(outcomes)
    header = ["model", "removed", "of all parameters"]
    header += ["perplexity"] if len(texts) == 1 else [f"perplexity on {describe_text(text)}" for text in texts]
    header.append("weight files")
    rows = []
    for outcome in outcomes:
        if outcome.allocation is None or not outcome.achieved:
            continue
        achieved = outcome.achieved
        measured = {text_of(row): f"{row['perplexity']:.2f}" for row in reversed(outcome.evaluations)}
        rows.append(
            [
                outcome.name,
                percent(achieved.get("sparsity")),
                percent(achieved.get("sparsity_of_all_parameters")),
                *(measured.get(text, "–") for text in texts),
                "–" if outcome.bytes is None else readable_bytes(outcome.bytes),
            ]
        )
    return Table(header, rows)


def measured(outcomes: Sequence[Outcome]) -> list[Measured]:
    """The rows of `quality_chart`: perplexities on the text that most were measured on."""
    texts = [text for outcome in outcomes for text in {text_of(row) for row in outcome.evaluations}]
    common = max(texts, key=texts.count, default=None)
    rows = []
    for outcome in outcomes:
        values = [
            row["perplexity"]
            for row in outcome.evaluations
            if text_of(row) == common and math.isfinite(row["perplexity"])
        ]
        if outcome.achieved:
            rows.append(Measured(outcome.name, values[0] if values else None, outcome.bytes))
    return rows


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
    quality = quality_table(outcomes)
    if quality.rows:
        texts = measured_texts(outcomes)
        caption = "No perplexity was measured: see optimum-cli dsa evaluate --json."
        if texts:
            only = f" on {describe_text(texts[0])}" if len(texts) == 1 else ""
            caption = f"Perplexity{only}: lower is better, and only comparable on one text."
        found.append(("In numbers", caption, quality))
    for outcome in outcomes:
        finalists = finalists_table(outcome)
        if finalists.rows:
            heading = "Finalists" + (f" of {outcome.name}" if len(outcomes) > 1 else "")
            found.append(
                (heading, "Losses on validation text after the real, sequential prune, best first.", finalists)
            )
    return found


def terminal(outcomes: Sequence[Outcome]) -> str:
    """The tables as text."""
    parts = [
        f"{one_line(heading)}. {one_line(caption)}\n{table}" for heading, caption, table in result_tables(outcomes)
    ]
    if allocations := compared(outcomes):
        table = block_table(allocations)
        bars = [[*row, bar(percentage(row[2])).ljust(20)] for row in table.rows]
        lines = str(Table([*table.header, ""], bars)).splitlines()
        parts.append("\n".join(line.rstrip() for line in lines))
    else:
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
