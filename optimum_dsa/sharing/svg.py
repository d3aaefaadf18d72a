"""Figures as SVG inside a page: its fonts, its colours in light and dark, and no file of their own."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

from .drawing import FIRST, INK, MUTED, OTHERS, PAPER, RULE, UNIFORM


if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--card",
    FIRST: "--first",
    UNIFORM: "--uniform",
    **{colour: f"--other-{number}" for number, colour in enumerate(OTHERS)},
}


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The `<svg>` element of `figure`, to be put into a page that sets the variables of `VARIABLES`.

    Args:
        name: the beginning of every id in it, so that the ids of several figures on one page differ.
        label: what a screen reader says.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text, which can be searched and read aloud; ids and dates are the same in every run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    text = re.sub(r"font: [^;\"']*?([\d.]+px) '[^;\"]*", r"font-size: \1", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", text)
    box = re.search(r'viewBox="[^"]*"', text)[0]
    head = f'<svg class="chart" role="img" aria-label="{escape(label)}" {box}>'
    return re.sub(r"\n\s*", "\n", head + text[text.index(">") + 1 :]).strip()
