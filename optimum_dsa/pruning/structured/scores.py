"""Importances of all structures of a model before any goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture
from ...model.walk import Reads, WalkedBlock, reads_of
from ..calibration import Calibration
from ..prune import run_steps
from .configuration import DSAStructuredConfig
from .gradients import Products, collect_products
from .importance import IMPORTANCES, importance_of
from .remove import scores_of
from .structure import Structures


class TakeScores:
    """Notes the importances of a block's structures, and changes nothing."""

    def __init__(
        self,
        config: DSAStructuredConfig,
        structures: Mapping[str, Structures],
        products: Mapping[str, Sequence[Products]],
    ):
        self.config, self.structures, self.products = config, structures, products
        self.true_sequential = False
        self.reads: Reads = reads_of(IMPORTANCES.fact(config.importance, "reads", "inputs"))
        self.notes: dict[str, Any] = {}
        self.scores: dict[str, Tensor] = {}  # unit -> (structures,) float32, on the CPU

    @torch.no_grad()
    def __call__(self, walked: WalkedBlock) -> None:
        units = {each.reads[0].tensor: each for each in self.structures.values() if each.block == walked.name}
        for group in walked.groups(self.true_sequential):
            for weight in group.weights:
                if (each := units.get(f"{weight.module}.{weight.attribute}")) is not None:
                    statistics = group.statistics.get(weight.name)
                    scores = scores_of(walked, each, statistics, self.config, self.products)
                    self.scores[each.unit] = scores.float().cpu()
                walked.done(weight, group)


def dense_scores(
    model: nn.Module,
    architecture: Architecture,
    calibration: Calibration,
    config: DSAStructuredConfig,
    structures: Mapping[str, Structures],
) -> dict[str, Tensor]:
    """Unit -> importances of its structures in the model as it is, (structures,) float32 on the CPU."""
    take = TakeScores(config, structures, products_of(model, structures, calibration, config))
    run_steps(model, architecture, calibration, config, [take], lambda walked: None)
    return {unit: take.scores[unit] for unit in structures}


def products_of(
    model: nn.Module, units: Mapping[str, Structures], calibration: Calibration, config: DSAStructuredConfig
) -> dict[str, list[Products]]:
    """Unit -> weights times gradients, of the model as it is: before anything goes; empty where nobody reads them.

    Raises:
        ValueError: they are of experts that are modules, of which none are taken.
    """
    read = {
        unit: each
        for unit, each in units.items()
        if IMPORTANCES.fact(importance_of(each.kind, config.importance), "gradients")
    }
    if not read:
        return {}
    if unknown := [unit for unit, each in read.items() if each.wholes]:
        raise ValueError(
            f"importance={config.importance!r} takes gradients of experts that share a parameter, and those of "
            f"{unknown[0]} are modules each; use importance='reap'."
        )
    needed = IMPORTANCES.fact(config.importance, "gradients")
    return collect_products(model, read, calibration.batches(1), needed, config.blockwise)
