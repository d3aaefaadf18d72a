"""Published one-shot methods as rows: metric × pattern × update."""

from __future__ import annotations

from dataclasses import dataclass

from ...common.registry import Registry
from .metrics import METRICS
from .updates import UPDATES


@dataclass(frozen=True)
class Method:
    """What to score by, within which sets of weights to remove, and how to update the rest."""

    metric: str
    pattern: str
    update: str = "none"


METHODS = Registry("method")

METHODS.add("magnitude", Method("magnitude", "matrix"), reference=METRICS.references["magnitude"])
METHODS.add("wanda", Method("wanda", "row"), reference=METRICS.references["wanda"])
METHODS.add("wanda_variant", Method("wanda_variant", "matrix"), reference=METRICS.references["wanda_variant"])
METHODS.add("ria", Method("ria", "matrix"), reference=METRICS.references["ria"])
METHODS.add("sparsegpt", Method("obs", "group:128", "sparsegpt"), reference=METRICS.references["obs"])
# The metric says only where a search begins: the update finds the support itself.
METHODS.add("alps", Method("obs", "matrix", "admm"), reference=UPDATES.references["admm"])
METHODS.add("wanda+refit", Method("wanda", "row", "refit"), reference=METRICS.references["wanda"])
METHODS.add("wanda+swap", Method("wanda", "row", "swap"), reference=UPDATES.references["swap"])
