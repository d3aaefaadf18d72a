"""A model as a prune of its structures would leave it, for as long as it is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...model.offload import is_offloaded
from ..prune import run_steps
from ..source import Source
from .biases import Biases, biases_for, lent
from .configuration import DSAStructuredConfig
from .prune import dense_of
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


def dense_to_try(
    model: nn.Module, calibration: Source | None, config: DSAStructuredConfig, times: str | Path | None = None
) -> Dense:
    """As `dense_of`, of a model to be shown [`as_pruned`]: biases that an update adds count, as they do in a prune.

    Raises:
        ValueError: there is nothing that can be cut out, or no bias for an update to add to, nor a switch for one.
    """
    dense = dense_of(model, calibration, config, times)
    biases = _biases(dense)
    if not biases.switches:
        return dense
    with lent(model, biases):
        counted = dense_of(model, calibration, config, times)
    # Its units have parts of biases that are there no more.
    return replace(dense, sizes=counted.sizes, costs=counted.costs, asked=counted.asked)


@contextmanager
def as_pruned(dense: Dense, counts: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """The model silenced to `counts` of every unit, with what makes up for them; put back, bit for bit, at the end.

    Nothing is cut: the model that prune gives computes the same, but for a reconstruction, which is not made here.
    Biases that an update adds to and the model lacks are lent. Costs the walk of a prune, and a copy of the matrices
    that read structures.

    Yields unit -> the structures that went, (n,) int64.
    """
    with lent(dense.model, _biases(dense)), _silenced(dense, counts) as gone:
        yield gone


def _biases(dense: Dense) -> Biases:
    """What an update adds to and the model lacks."""
    return biases_for(dense.model, dense.units) if dense.config.update == "bias" else Biases()


@contextmanager
def _silenced(dense: Dense, counts: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """As `as_pruned`, of a model that has the biases that an update adds to."""
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
