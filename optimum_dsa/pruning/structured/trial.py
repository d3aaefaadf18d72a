"""A model as a prune of its structures would leave it, for as long as it is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..prune import run_steps
from .remove import RemoveStructures, looked_at
from .widths.dense import Dense


@contextmanager
def as_pruned(dense: Dense, counts: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """The model silenced to `counts` of every unit, with what makes up for them; put back, bit for bit, at the end.

    Nothing is cut: the model that prune gives computes the same, but for a reconstruction, which is not made here.
    Costs the walk of a prune, and a copy of the matrices that read structures.

    Yields unit -> the structures that went, (n,) int64.
    """
    units = looked_at(dense.config, dense.units, dense.found)
    remove = RemoveStructures(dense.config, units, counts)
    known = dict(dense.model.named_parameters())
    names = {cut.tensor for each in units.values() for cut in each.reads}
    # Of an update "bias", too.
    names |= {f"{name.rpartition('.')[0]}.bias" for name in names} & known.keys()
    kept = {name: known[name].detach().clone() for name in names}
    try:
        run_steps(dense.model, dense.architecture, dense.calibration, dense.config, [remove], lambda walked: None)
        yield remove.gone
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                known[name].copy_(value)
