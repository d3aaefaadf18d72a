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


# The fact `about` is what the help of `optimum-cli dsa prune` says of a method.
METHODS = Registry("method")

METHODS.add(
    "magnitude",
    Method("magnitude", "matrix"),
    reference=METRICS.references["magnitude"],
    about="|W|, needs no data",
)
METHODS.add(
    "wanda",
    Method("wanda", "row"),
    reference=METRICS.references["wanda"],
    about="|W| times the norm of its input, per row (default)",
)
METHODS.add(
    "wanda_variant",
    Method("wanda_variant", "matrix"),
    reference=METRICS.references["wanda_variant"],
    about="the same, rows may differ",
)
METHODS.add(
    "ria",
    Method("ria", "matrix"),
    reference=METRICS.references["ria"],
    about="relative importance and activations",
)
METHODS.add(
    "gblm",
    Method("gblm", "row"),
    reference=METRICS.references["gblm"],
    about="wanda blended with gradients of the loss: backward passes of the whole model",
)
METHODS.add(
    "pruner_zero",
    Method("pruner_zero", "row"),
    reference=METRICS.references["pruner_zero"],
    about="W² times the gradient of the loss, scaled per matrix",
)
METHODS.add(
    "wanda++",
    Method("wanda++", "row"),
    reference=METRICS.references["wanda++"],
    about="wanda blended with gradients of what its block gives: backward passes of one block",
)
METHODS.add(
    "sparsegpt",
    Method("obs", "group:128", "sparsegpt"),
    reference=METRICS.references["obs"],
    about="second order, and the kept weights make up for the removed ones",
)
# The fact `still`: by what matrices are scored that are pruned without the update.
METHODS.add(
    "d2prune",
    Method("d2", "group:128", "sparsegpt"),
    reference=METRICS.references["d2"],
    about="sparsegpt, and which of q, k and v it leaves as they are is tried: a prune for each choice",
    still="d2_still",
)
# The metric says only where a search begins: the update finds the support itself.
METHODS.add(
    "alps",
    Method("obs", "matrix", "admm"),
    reference=UPDATES.references["admm"],
    about="which weights stay, and what they become, from one objective: dearer and better",
)
METHODS.add(
    "wanda+refit",
    Method("wanda", "row", "refit"),
    reference=METRICS.references["wanda"],
    about="wanda's mask, and the least squares weights on it",
)
METHODS.add(
    "wanda+swap",
    Method("wanda", "row", "swap"),
    reference=UPDATES.references["swap"],
    about="wanda's mask bettered by exchanges, the weights as they are",
)
METHODS.add(
    "wanda+dsnot",
    Method("wanda", "row", "dsnot"),
    reference=UPDATES.references["dsnot"],
    about="wanda's mask, exchanged until the expected outputs are what they were: as cheap",
)
