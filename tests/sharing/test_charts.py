import io
import re
import sys
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex

from optimum_dsa import Allocation, SearchTrace
from optimum_dsa.common.installation import how_to_install
from optimum_dsa.search.space import Candidate
from optimum_dsa.search.trace import Request, Trial
from optimum_dsa.sharing.charts import (
    Measured,
    allocation_chart,
    heat_map,
    quality_chart,
    readable_bytes,
    search_curves,
    short_number,
    training_curves,
)
from optimum_dsa.sharing.drawing import FIRST, OTHERS, styles
from optimum_dsa.sharing.drawing import UNIFORM as QUIET


SIZES = {"layers.0.q.weight": 10, "layers.0.up.weight": 30, "layers.1.q.weight": 10, "layers.1.up.weight": 30}
MATRICES = Allocation(dict(zip(SIZES, (0.2, 0.6, 0.4, 0.8))), SIZES, "found")
UNIFORM = Allocation({"layers.0": 0.6, "layers.1": 0.6}, {"layers.0": 40, "layers.1": 40}, "uniform")


def lines(figure):
    """Label -> heights of every line of a chart's first axes."""
    return {line.get_label(): line.get_ydata() for line in figure.axes[0].lines if line.get_label()[0] != "_"}


def trace_of(*trials):
    """A trace of (kind, counts, start, stop, loss, tokens)."""
    trace = SearchTrace()
    trace.trials = [
        Trial(number, Request(kind, Candidate(), start, stop), loss, tokens=spent, counts=counts)
        for number, (kind, counts, start, stop, loss, spent) in enumerate(trials)
    ]
    return trace


TRACE = trace_of(
    ("loss", (1,), 0, 1, 0.1, 10),  # met one window of two: says too little
    ("loss", (2,), 0, 1, 0.6, 10),
    ("loss", (2,), 1, 2, 0.4, 10),  # mean 0.5
    ("loss", (3,), 0, 2, 0.7, 20),  # worse
    ("anchor", (2,), 0, 0, None, 0),
    ("slopes", (4,), 4, 8, 0.3, 60),
    ("sequential", (4,), 0, 8, 0.35, 40),
)


def test_allocations_of_any_granularity_are_drawn_per_block():
    drawn = lines(allocation_chart({"found": MATRICES, "uniform": UNIFORM}))
    assert list(drawn) == ["found", "uniform"]
    assert drawn["found"] == pytest.approx([0.5, 0.7])
    assert drawn["uniform"] == pytest.approx([0.6, 0.6])


def test_lines_differ_by_more_than_colour():
    figure = allocation_chart({str(number): replace(MATRICES, name=str(number)) for number in range(5)})
    styles = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len({colour for colour, _, _ in styles}) == 5
    assert len({(marker, dash) for _, marker, dash in styles}) == 5


@pytest.mark.parametrize("names", [["dsa", "owl", "uniform"], ["owl", "descent", "dsa"], ["uniform", "owl"], ["owl"]])
def test_a_colour_belongs_to_an_allocation_whatever_stands_beside_it(names):
    colours = {name: style["color"] for name, style in styles({f"model {name}": name for name in names}).items()}
    assert len(set(colours.values())) == len(names)
    for name, colour in {"dsa": FIRST, "owl": OTHERS[0], "uniform": QUIET}.items():
        assert colours.get(f"model {name}", colour) == colour


def test_two_models_of_one_allocation_share_its_colour_and_differ_by_their_lines():
    first, second = styles({"pruned": "owl", "recovered": "owl"}).values()
    assert first["color"] == second["color"]
    assert (first["marker"], first["linestyle"]) != (second["marker"], second["linestyle"])


def test_a_heat_map_has_a_row_per_kind_and_a_column_per_block():
    figure = heat_map(MATRICES)
    axes = figure.axes[0]
    assert axes.collections[0].get_array().tolist() == [[0.2, 0.4], pytest.approx([0.6, 0.8])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "up"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert [text.get_text() for text in axes.texts] == ["20", "40", "60", "80"]


def test_a_heat_map_of_blocks_has_one_row_and_one_with_gaps_leaves_them_out():
    assert heat_map(UNIFORM).axes[0].collections[0].get_array().tolist() == [[0.6, 0.6]]
    sparsity = {name: share for name, share in MATRICES.sparsity.items() if name != "layers.1.q.weight"}
    cells = heat_map(Allocation(sparsity, dict.fromkeys(sparsity, 1))).axes[0].collections[0].get_array()
    assert cells.mask.tolist() == [[False, True], [False, False]]


def test_numbers_on_a_heat_map_can_be_read():
    """A contrast of at least 3:1 between every number and its cell."""
    names = [f"layers.{number}" for number in range(12)]
    figure = heat_map(Allocation({name: number / 12 for number, name in enumerate(names)}, dict.fromkeys(names, 1)))
    figure.savefig(io.BytesIO(), format="svg")
    mesh, texts = figure.axes[0].collections[0], figure.axes[0].texts
    for face, text in zip(mesh.get_facecolors(), texts):
        light, dark = sorted((luminance(to_hex(face)), luminance(text.get_color())), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, text.get_text()


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_search_curve_counts_what_met_as_many_windows_as_the_others():
    assert TRACE.best_so_far() == ([30, 110, 150], pytest.approx([0.5, 0.3, 0.3]))
    assert SearchTrace().best_so_far() == ([], [])
    figure = search_curves({"evolution": TRACE, "random": trace_of(("loss", (1,), 0, 1, 0.9, 25))})
    drawn = lines(figure)
    assert drawn["evolution"] == pytest.approx([0.5, 0.3, 0.3]) and drawn["random"] == pytest.approx([0.9])
    stars = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in stars] == [([150], [0.35])]


def test_training_is_drawn_where_a_loss_was_measured():
    one = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0, "eval_loss": 2.5}, {"step": 6, "eval_loss": 2.25}]
    figure = training_curves({"one": one, "two": [{"step": 6, "loss": 1.0}]})
    assert list(lines(figure)["one"]) == [2.5, 2.25]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    assert drawn == [([2, 4], [3.0, 2.0]), ([4, 6], [2.5, 2.25]), ([6], [1.0])]


def test_quality_is_drawn_where_it_was_measured():
    figure = quality_chart([Measured("dense", 10.0, 2_000_000), Measured("pruned", 12.5), Measured("other", None, 5)])
    perplexity, size = figure.axes
    assert [bar.get_width() for bar in perplexity.patches] == [10.0, 12.5, 0]
    assert [text.get_text() for text in perplexity.texts] == ["10", "12.5", "not measured"]
    assert [text.get_text() for text in size.texts] == ["2 MB", "not measured", "5 B"]
    assert len(quality_chart([Measured("a", 3.0)]).axes) == 1
    broken = quality_chart([Measured("good", 10.0), Measured("broken", 1e304)]).axes[0]
    assert [bar.get_width() for bar in broken.patches] == [10.0, 80.0]
    assert [text.get_text() for text in broken.texts] == ["10", "1e+304"]
    with pytest.raises(ValueError, match="nothing to draw"):
        quality_chart([Measured("a")])


def test_numbers_are_short():
    assert [short_number(value) for value in (7, 20_000, 1_500_000)] == ["7", "20k", "1.5M"]
    assert [readable_bytes(value) for value in (12, 2_140_000_000)] == ["12 B", "2.14 GB"]


def test_no_global_state_is_touched():
    allocation_chart({"found": MATRICES}, "Title").savefig(io.BytesIO())
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape(how_to_install("plots"))):
        heat_map(MATRICES)
