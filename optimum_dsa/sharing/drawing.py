"""What all charts have in common: paper, ink, lines and axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..common.escaping import one_line
from ..common.installation import how_to_install
from ..pruning.allocation.layout import place, short_names


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1b1f24", "#59636e", "#e3e6ea", "#ffffff"
FIRST, UNIFORM = "#0072b2", "#8a929b"
OTHERS = ("#d55e00", "#009e73", "#b8628f", "#e69f00", "#56b4e9")
MARKERS, DASHES = "osD^vP", ("-", (0, (6, 1.6)), (0, (4, 1.5, 1, 1.5)), (0, (1.5, 1.2)))
# Colours that belong to an allocation; what a search found has its own.
QUIET = {"uniform": UNIFORM, "dense": MUTED}
OWN = {"dsa": FIRST, "owl": OTHERS[0], "dlp": OTHERS[2], "alphapruning": OTHERS[3], "lsa": OTHERS[4]}
DISCOVERED = OTHERS[1]
WIDTH = 5.2  # inches: as wide as a phone, so that nothing gets smaller on one


def require_matplotlib() -> None:
    """Raise `ImportError`, with what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(f"Plots need matplotlib: {how_to_install('plots')}.") from None


def new_figure(width: float, height: float, title: str | None, panels: int = 1) -> tuple[Figure, Axes]:
    """A figure with quiet axes; it belongs to nobody but the caller."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height + (0.25 if title else 0)), layout="constrained", facecolor=PAPER)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    for axes in figure.subplots(1, panels, squeeze=False)[0]:
        axes.set_facecolor("none")
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0, colors=MUTED, labelsize=9)
        axes.xaxis.label.set(color=MUTED, fontsize=9.5)
        axes.yaxis.label.set(color=MUTED, fontsize=9.5)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=11.5, fontweight="bold", color=INK)
    return figure, figure.axes[0]


def styles(labels: Sequence[str] | Mapping[str, str]) -> dict[str, dict]:
    """The line of each label: its colour, marker and dash.

    A colour belongs to an allocation, so that it is the same on every chart and page; labels that share an allocation
    share its colour and differ by marker and dash.

    Args:
        labels: the labels, or label -> name of its allocation.
    """
    names = dict(labels) if isinstance(labels, Mapping) else {label: label for label in labels}
    colours = _colours(list(names.values()))
    dealt = {}
    for number, (label, name) in enumerate(names.items()):
        dealt[label] = {
            "color": colours[name],
            "linestyle": DASHES[number % len(DASHES)],
            "linewidth": 1.6 if number else 2.4,
            "marker": MARKERS[number % len(MARKERS)],
            "markeredgecolor": PAPER,
            "markeredgewidth": 0.8,
            "zorder": 3 if number else 4,
        }
        if name in QUIET and number:
            dealt[label] |= {"linestyle": (0, (3, 2)), "linewidth": 1.4, "marker": "", "zorder": 2}
    return dealt


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Allocation -> colour: its own where it has one and no other has it here, else the first that is free."""
    found: dict[str, str] = {}
    palette = [FIRST, *OTHERS]
    for name in [*filter(OWN.__contains__, names), *names]:
        if name in QUIET:
            found[name] = QUIET[name]
        elif name not in found:
            free = [colour for colour in palette if colour not in found.values()]
            own = OWN.get(name, DISCOVERED)
            found[name] = own if own in free else free[0] if free else palette[len(found) % len(palette)]
    return found


def block_axis(axes: Axes, blocks: Sequence[str], shift: float = 0.0) -> None:
    """Block numbers along x; a line and a name where another stack begins."""
    places = [place(block) for block in blocks]
    step = max(math.ceil(len(blocks) / 16), 1)
    starts = [i for i, at in enumerate(places) if i == 0 or at.stack != places[i - 1].stack]
    names = short_names({places[i].stack for i in starts})
    ticks, labels = [], []
    for i, at in enumerate(places):
        begin = max(start for start in starts if start <= i)
        if (i - begin) % step == 0:
            ticks.append(i + shift)
            number = "" if at.index is None else str(at.index)
            labels.append(f"{number}\n{plain(names[at.stack])}" if len(starts) > 1 and i == begin else number)
    for start in starts[1:]:
        axes.axvline(start - 0.5 + shift, color=RULE, linewidth=1)
    axes.set_xticks(ticks, labels)
    axes.set_xlabel("block")
    axes.set_xlim(-0.5 + shift, len(blocks) - 0.5 + shift)


def plain(text: str, longest: int = 30) -> str:
    """`text` as matplotlib shows it letter by letter: no formulas, nothing hidden, cut where it is long."""
    text = one_line(text)
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def percent(axis) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_locator(few_ticks())
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 2):g}%"))


def few_ticks(number: int = 5, whole: bool = False):
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(number, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], integer=whole)


def legend(axes: Axes, number: int) -> None:
    """The labels above the chart, in the order of the lines; none for one line."""
    if number > 1:
        longest = max(len(text) for text in axes.get_legend_handles_labels()[1])
        columns = max(min(number, 4, 60 // (longest + 8)), 1)  # as many as the chart is wide
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9.5, labelcolor=INK,
            borderaxespad=0.2, handlelength=2.4, columnspacing=1.4,
        )  # fmt: skip
