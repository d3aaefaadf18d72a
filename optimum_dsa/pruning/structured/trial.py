"""A model as a prune of its structures would leave it, for as long as it is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ...model.offload import is_offloaded
from ..prune import run_steps
from .configuration import DSAStructuredConfig
from .remove import RemoveStructures
from .structure import WHOLE
from .tied import tied_gone
from .wholes.entire import entire_gone
from .wholes.experts import routed_without
from .wholes.remove import choose_wholes
from .widths.dense import Dense


def check_tried(config: DSAStructuredConfig, who: str, model: nn.Module | None = None) -> None:
    """Raise `ValueError` where what goes cannot be put back: `who` tries it."""
    if model is not None and is_offloaded(model):
        raise ValueError(
            f"{who} changes the whole model and puts it back, and some of its weights are elsewhere (offloaded); load "
            "it without device_map, or with one of devices alone."
        )
    if "block" in config.structures or config.learner:
        given = f"learner={config.learner!r}" if config.learner else "'block' is to go"
        raise ValueError(
            f"{who} is of channels, heads and experts that the least importance chooses, and {given}; leave it out."
        )


@contextmanager
def as_pruned(dense: Dense, counts: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """The model silenced to `counts` of every unit, with what makes up for them; put back, bit for bit, at the end.

    Nothing is cut: the model that prune gives computes the same, but for a reconstruction, which is not made here.
    Costs the walk of a prune, and a copy of the matrices that read structures.

    Yields unit -> the structures that went, (n,) int64.
    """
    model, config, units = dense.model, dense.config, dense.units
    wholes = choose_wholes(model, units, counts, dense.calibration, config, dense.products)
    parts = {unit: each for unit, each in units.items() if each.kind not in WHOLE}
    chosen = tied_gone(dense, counts) | entire_gone(units, counts)
    remove = RemoveStructures(config, parts, counts, chosen, dense.products)
    known = dict(model.named_parameters())
    names = {cut.tensor for each in units.values() for cut in each.reads}
    # Of an update "bias", too.
    names |= {f"{name.rpartition('.')[0]}.bias" for name in names} & known.keys()
    kept = {name: known[name].detach().clone() for name in names}
    try:
        with ExitStack() as routed:
            for unit, gone in wholes.items():
                routed.enter_context(routed_without(model, units[unit], gone))
            if parts:
                run_steps(model, dense.architecture, dense.calibration, config, [remove], lambda walked: None)
            yield wholes | remove.gone
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                known[name].copy_(value)
