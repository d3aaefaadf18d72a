"""The picture in README.md, from figures that `optimum-cli dsa demo` measured.

    optimum-cli dsa demo --json > docs/source/images/demo.json
    python tools/readme_picture.py

Left, how many weights went from each block; right, what that cost. It needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from optimum_dsa.sharing.drawing import INK, MUTED, PAPER, RULE, percent, styles


IMAGES = Path(__file__).resolve().parents[1] / "docs" / "source" / "images"


def draw(rows: list[dict]) -> Figure:
    """Shares by block and perplexities of the demo's rows, one colour per allocation."""
    figure = Figure(figsize=(9, 3.1), layout="constrained", facecolor=PAPER)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    looks = styles({row["name"]: row["name"] for row in rows})
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=MUTED, labelsize=9)
    for row in rows:
        if row["blocks"]:
            thick = {"linewidth": 2.6 if row["name"] == "discovered" else 1.4, "markersize": 4.5}
            left.plot(
                range(len(row["blocks"])),
                list(row["blocks"].values()),
                label=row["name"],
                **looks[row["name"]] | thick,
            )
    percent(left.yaxis)
    left.grid(axis="y", color=RULE, linewidth=0.8)
    left.set_xticks(range(len(rows[-1]["blocks"])))
    left.set_xlabel("block", color=MUTED, fontsize=9.5)
    left.set_title("weights removed from each block", fontsize=10.5, color=INK, loc="left")
    left.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2, loc="lower right")
    names, lengths = [row["name"] for row in rows], [row["perplexity"] for row in rows]
    bars = right.barh(names, lengths, color=[looks[name]["color"] for name in names], height=0.62)
    right.bar_label(bars, [f"{length:.1f}" for length in lengths], padding=4, fontsize=9.5, color=INK)
    right.invert_yaxis()
    right.set_xticks([])
    right.set_xlim(0, 1.15 * max(lengths))
    right.set_title("perplexity on unseen text, lower is better", fontsize=10.5, color=INK, loc="left")
    return figure


def main() -> None:
    rows = json.loads((IMAGES / "demo.json").read_text(encoding="utf-8"))["rows"]
    # letters as shapes: a reader's fonts do not move them
    with rc_context({"svg.hashsalt": "demo", "svg.fonttype": "path"}):
        draw(rows).savefig(IMAGES / "demo.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
