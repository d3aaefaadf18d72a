"""Published one-shot methods as rows: metric × pattern × update."""

from __future__ import annotations

from dataclasses import dataclass

from ...common.registry import Registry
from .metrics import METRICS


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
