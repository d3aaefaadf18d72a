"""What a search asks of that which it allocates: how large it is, and the model as it would be."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from ...common.registry import Registry
from ...model.architecture import Architecture
from ...pruning.allocate import architecture_for
from ...pruning.allocation import Allocation
from ...pruning.calibration import Calibration
from ...pruning.configuration import DSAConfig


class Realisation(Protocol):
    """A model that can be as if so much of each unit were gone, and never is.

    Strategies know units, sizes and steps; what goes, and in which pattern, is known here alone.

    Attributes:
        architecture: what can be removed from.
        sizes: unit -> weights, in the model's order.
        steps: unit -> the least number of weights by which it can change.
    """

    architecture: Architecture
    sizes: Mapping[str, int]
    steps: Mapping[str, int]

    def fitted(self, allocation: Allocation) -> Allocation:
        """What `prune` would make of an allocation: itself, where every unit can change by a single weight."""

    def move_anchor(self, counts: Mapping[str, int] | None) -> None:
        """From now on, take what decides what goes from the model without `counts`; `None`: from where it begins."""

    def at(self, counts: Mapping[str, int]) -> AbstractContextManager[None]:
        """The model computes as if `counts`, of a fitted allocation, were gone: a proxy, from the anchor."""

    def slopes(self, counts: Mapping[str, int]) -> AbstractContextManager[dict[str, float]]:
        """The model as `at`, for backward passes of a loss.

        Yields unit -> how fast the loss rises as one more weight goes; it fills as the passes are made.
        """

    def errors(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Unit -> the share of its output that is lost at `counts`, at the anchor; points of its error curve.

        Raises:
            ValueError: it knows of none.
        """

    def pruned(self, counts: Mapping[str, int]) -> AbstractContextManager[None]:
        """The model computes as `prune` would leave it, weight by weight. The anchor's knowledge is given up."""


# (model, architecture, calibration, config) -> `Realisation`. The fact `proxy` says what candidates race by, in words.
REALISATIONS = Registry("realisation")


def realise(
    model: nn.Module, calibration: Calibration | None, config: DSAConfig, kind: str = "masks", **options
) -> Realisation:
    """The row `kind` of `REALISATIONS` on what `config` prunes in `model`, with options of that row."""
    check_searchable(config)
    return REALISATIONS[kind](model, architecture_for(model, config), calibration, config, **options)


def suited(config: DSAConfig) -> str:
    """The row of `REALISATIONS` for the method of `config`: an order tells nothing of what an update makes."""
    return "database" if config.resolved.updates else "masks"


def check_searchable(config: DSAConfig) -> None:
    """Raise `ValueError` where `config` leaves nothing to allocate."""
    pattern = config.resolved.pattern
    if pattern.sparsity is not None:
        raise ValueError(
            f"Pattern {pattern} removes {pattern.sparsity:.4g} of every matrix, so there is no allocation to search "
            f"for; use pattern='mixed:{pattern.width}', in which N differs from unit to unit."
        )
    if config.overrides:
        raise ValueError(
            f"overrides={config.overrides} give some matrices a sparsity, and a search chooses that of all; leave "
            "them out, or prune with a named allocation."
        )
    # It would be passed over, and stand in the result as if it had not been.
    if config.granularity != "block":
        raise ValueError(
            f"granularity={config.granularity!r} is of an allocation that is computed; a search tries named ones per "
            "block, and chooses for every matrix where its strategy does. Leave it out."
        )
