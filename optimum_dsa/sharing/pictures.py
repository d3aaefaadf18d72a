"""What results look like: figures of what other rooms found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..search.result import SearchResult
from ..search.sensitivity import Sensitivity
from .charts import allocation_chart, error_curves, heat_map, search_curves


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_search(result: SearchResult) -> dict[str, Figure]:
    """Matplotlib figures of a search by name: "search", "allocation" and "heatmap".

    Raises:
        ImportError: matplotlib (the extra `plots`) is not there.
    """
    strategy = result.trace.settings.get("strategy", "search")
    return {
        "search": search_curves({strategy: result.trace}, "Search"),
        "allocation": allocation_chart({"found": result.best, **result.baselines}, "Sparsity per block"),
        "heatmap": heat_map(result.best, "Sparsity of what was found"),
    }


def plot_sensitivity(found: Sensitivity) -> Figure:
    """Matplotlib figure of error curves: those of blocks, first to last, and those of kinds of matrix.

    Raises:
        ImportError: matplotlib (the extra `plots`) is not there.
    """
    panels = {"per block, first to last": found.by_block(), "per kind of matrix": found.by_kind()}
    return error_curves(found.levels, panels, f"Output lost under {found.config.method}")
