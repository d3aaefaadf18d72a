"""Pictures of allocations, searches and results: functions that return matplotlib figures.

They need matplotlib (the extra `plots`), touch none of its global state and open no window: call
`savefig` on what comes back. Colours are Okabe and Ito's, told apart by every kind of colour vision; lines differ by
marker and dash as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..pruning.allocation import Allocation
from ..pruning.allocation.layout import by_block, grid, short_names
from .drawing import (
    FIRST,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    RULE,
    WIDTH,
    block_axis,
    few_ticks,
    legend,
    new_figure,
    percent,
    plain,
    styles,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..search.trace import SearchTrace

ANNOTATED = 16  # blocks, up to which a heat map's cells carry their number


@dataclass(frozen=True)
class Measured:
    """A model's figures, for `quality_chart`.

    Attributes:
        name (`str`): as shown.
        perplexity (`float`, *optional*): lower is better.
        bytes (`int`, *optional*): of the weight files.
    """

    name: str
    perplexity: float | None = None
    bytes: int | None = None


def allocation_chart(allocations: Mapping[str, Allocation], title: str | None = None) -> Figure:
    """The sparsity of every block, one line per allocation: the first is the one to look at, "uniform" stays quiet.

    Args:
        allocations (`Mapping[str, Allocation]`): label -> allocation, per block or per matrix.
        title (`str`, *optional*): above the chart.
    """
    figure, axes = new_figure(WIDTH, 2.9, title)
    shares = {label: by_block(allocation) for label, allocation in allocations.items()}
    blocks = list(dict.fromkeys(block for values in shares.values() for block in values))
    looks = styles({label: allocation.name for label, allocation in allocations.items()})
    for label, values in shares.items():
        heights = [values.get(block, math.nan) for block in blocks]
        few = len(blocks) <= 40
        axes.plot(range(len(blocks)), heights, label=plain(label), markersize=5 if few else 0, **looks[label])
    first = next(iter(shares.values()))
    if "uniform" in shares:
        low, high = ([values.get(block, math.nan) for block in blocks] for values in (first, shares["uniform"]))
        colour = looks[next(iter(shares))]["color"]
        axes.fill_between(range(len(blocks)), low, high, color=colour, alpha=0.1, linewidth=0)
    block_axis(axes, blocks)
    axes.set_ylabel("weights removed")
    percent(axes.yaxis)
    if (low := axes.get_ylim())[1] - low[0] < 0.02:
        axes.set_ylim(max(low[0] - 0.05, -0.01), min(low[1] + 0.05, 1.01))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    legend(axes, len(shares))
    return figure


def heat_map(allocation: Allocation, title: str | None = None, bounds: tuple[float, float] | None = None) -> Figure:
    """The sparsity of every block (across) and kind of matrix (down); one row where the units are whole blocks.

    Args:
        allocation (`Allocation`): per block or per matrix.
        title (`str`, *optional*): above the chart.
        bounds (`tuple[float, float]`, *optional*): sparsities of the lightest and the darkest colour, so that several
            maps can be compared; by default the allocation's own.
    """
    blocks, kinds, shares = grid(allocation)
    values = [[shares.get((block, kind), math.nan) for block in blocks] for kind in kinds]
    figure, axes = new_figure(WIDTH, 0.9 + 0.3 * max(len(kinds), 2), title)
    low, high = bounds or (min(shares.values()), max(shares.values()))
    middle, half = (low + high) / 2, max((high - low) / 2, 0.02)
    mesh = axes.pcolormesh(
        values,
        cmap="YlGnBu",
        vmin=middle - half,
        vmax=middle + half,
        edgecolors=PAPER,
        linewidth=1 if len(blocks) <= 40 else 0.3,
    )
    axes.invert_yaxis()
    block_axis(axes, blocks, shift=0.5)
    names = short_names(kinds)
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], [plain(names[kind]) for kind in kinds])
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=14, fraction=0.06)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=MUTED, labelsize=8.5)
    percent(bar.ax.yaxis)
    if len(blocks) <= ANNOTATED:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if value == value:
                    ink = "#fefefe" if value > middle + 0.1 * half else "#14213d"
                    number = f"{100 * value:.0f}"
                    axes.text(column + 0.5, row + 0.5, number, color=ink, ha="center", va="center", fontsize=8)
    return figure


def width_chart(kinds: Mapping[str, Mapping[str, tuple[int, int]]], title: str | None = None) -> Figure:
    """How many structures stay in every block, of how many: bars in the outline of what there was, a panel per kind.

    Args:
        kinds (`Mapping[str, Mapping[str, tuple[int, int]]]`): kind -> block -> how many stay, and how many there were.
        title (`str`, *optional*): above the chart.
    """
    figure, _ = new_figure(WIDTH * max(1, 0.75 * len(kinds)), 2.6, title, len(kinds))
    for axes, (kind, blocks) in zip(figure.axes, kinds.items()):
        places, (stay, were) = range(len(blocks)), zip(*blocks.values())
        axes.bar(places, were, width=0.8, color=RULE)
        axes.bar(places, stay, width=0.8, color=FIRST)
        block_axis(axes, list(blocks))
        axes.yaxis.set_major_locator(few_ticks(whole=True))
        axes.set_title(plain(kind), fontsize=9.5, color=MUTED, loc="left")
    return figure


def search_curves(
    traces: Mapping[str, SearchTrace], title: str | None = None, among: Mapping[str, str] | None = None
) -> Figure:
    """The best proxy loss against the tokens that it took, a line per search.

    The proxy is the validation loss with the masks that a search works with. A star is its best finalist after the
    real prune, where it has come so far.

    Args:
        traces (`Mapping[str, SearchTrace]`): label -> trace.
        title (`str`, *optional*): above the chart.
        among (`Mapping[str, str]`, *optional*): label -> name of its allocation, of all charts that stand together, so
            that all give a label the same colour.
    """
    from matplotlib.ticker import FuncFormatter

    figure, axes = new_figure(WIDTH, 2.9, title)
    looks = styles(among or list(traces))
    for label, trace in traces.items():
        style = looks[label]
        tokens, losses = trace.best_so_far()
        axes.plot(tokens, losses, label=plain(label), drawstyle="steps-post", **(style | {"marker": ""}))
        ends = [trial.loss for trial in trace.trials if trial.request.kind == "sequential" and trial.loss is not None]
        if ends:
            spent = sum(trial.tokens for trial in trace.trials)
            axes.plot([spent], [min(ends)], marker="*", markersize=12, color=style["color"], linestyle="")
    axes.set_xlabel("validation tokens spent")
    axes.set_ylabel("best loss so far (proxy)")
    axes.xaxis.set_major_locator(few_ticks(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    legend(axes, len(traces))
    return figure


def error_curves(
    levels: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]], title: str | None = None
) -> Figure:
    """The share of output lost against the share of weights removed, a panel for each set of curves.

    A set of more curves than there are markers goes from light to dark in its order, without a legend.

    Args:
        levels (`Sequence[float]`): sparsities.
        panels (`Mapping[str, Mapping[str, Sequence[float]]]`): heading -> label -> errors at these levels.
        title (`str`, *optional*): above the chart.
    """
    figure, _ = new_figure(1.6 * WIDTH, 3.2, title, len(panels))
    for axes, (heading, curves) in zip(figure.axes, panels.items()):
        names, looks, many = short_names(curves), styles(list(curves)), len(curves) > len(MARKERS) + 1
        for number, (label, errors) in enumerate(curves.items()):
            shade = 0.75 - 0.65 * number / max(len(curves) - 1, 1)
            look = {"color": str(shade), "linewidth": 1.4} if many else looks[label]
            axes.plot(levels, errors, label=plain(names[label]), **look)
        axes.set_title(heading, fontsize=9.5, color=MUTED, loc="left", pad=6 if many else 34)
        axes.set_yscale("log")
        axes.set_xlabel("weights removed")
        percent(axes.xaxis)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        if not many:
            legend(axes, len(curves))
    figure.axes[0].set_ylabel("share of output lost")
    return figure


def training_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    title: str | None = None,
    among: Mapping[str, str] | None = None,
) -> Figure:
    """Validation loss by step of training after pruning, a line per model; the training loss is thin.

    Args:
        histories (`Mapping[str, Sequence[Mapping[str, Any]]]`): label -> `RecoveryResult.history`.
        title (`str`, *optional*): above the chart.
        among (`Mapping[str, str]`, *optional*): label -> name of its allocation, of all charts that stand together, so
            that all give a label the same colour.
    """
    figure, axes = new_figure(WIDTH, 2.9, title)
    looks = styles(among or list(histories))
    for label, history in histories.items():
        for name, style in (("loss", {"linewidth": 1, "marker": "", "alpha": 0.5}), ("eval_loss", {"markersize": 5})):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                shown = plain(label) if name == "eval_loss" else None
                axes.plot(*zip(*points), label=shown, **(looks[label] | style))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(few_ticks(6))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    legend(axes, len(histories))
    return figure


def quality_chart(
    rows: Sequence[Measured], title: str | None = None, among: Mapping[str, str] | None = None
) -> Figure:
    """Perplexity and bytes of several models side by side, as bars; what nobody measured has no panel.

    A bar ends at eight times the shortest one, so that a model that broke down does not hide how the others differ.

    Args:
        rows (`Sequence[Measured]`): the models, first on top.
        title (`str`, *optional*): above the chart.
        among (`Mapping[str, str]`, *optional*): label -> name of its allocation, of all charts that stand together, so
            that all give a label the same colour.
    """
    panels = [("perplexity (lower is better)", [row.perplexity for row in rows], lambda value: f"{value:.4g}")]
    panels.append(("weight files", [row.bytes for row in rows], readable_bytes))
    panels = [panel for panel in panels if _tells(panel[1])] or [
        panel for panel in panels if any(value is not None for value in panel[1])
    ]
    if not panels:
        raise ValueError("No row has a perplexity or bytes, so there is nothing to draw.")
    figure, first = new_figure(WIDTH, 0.75 + 0.36 * len(rows), title, len(panels))
    looks = styles({row.name: row.name for row in rows} | dict(among or {}))
    colours = [looks[row.name]["color"] for row in rows]
    for axes, (label, values, show) in zip(figure.axes, panels):
        end = 8 * min(value for value in values if value is not None)
        lengths = [min(value or 0, end) for value in values]
        bars = axes.barh(range(len(rows)), lengths, color=colours, height=0.62)
        shown = ["not measured" if value is None else show(value) for value in values]
        axes.bar_label(bars, shown, padding=4, fontsize=9, color=INK)
        axes.set_xlim(0, 1.35 * max(lengths) or 1)
        axes.set_xticks([])
        axes.set_title(label, fontsize=9.5, color=MUTED, loc="left")
        axes.set_yticks(range(len(rows)), [plain(row.name, 22) for row in rows] if axes is first else [])
        axes.invert_yaxis()
    return figure


def _tells(values: Sequence[float | None]) -> bool:
    """Whether bars of these lengths would differ: equal ones say nothing that a table does not."""
    known = [value for value in values if value is not None]
    return bool(known) and max(known) > 1.02 * min(known)


def short_number(value: float) -> str:
    """A count in three digits: 1.5M, 20k, 7."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def readable_bytes(value: float) -> str:
    """Bytes in a unit that fits: 2.1 GB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
