"""Importances of all structures of a model before any goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture
from ...model.walk import Reads, WalkedBlock, reads_of
from ..calibration import Calibration
from ..prune import run_steps
from .configuration import DSAStructuredConfig
from .importance import IMPORTANCES
from .remove import parts_of
from .structure import Structures


class TakeScores:
    """Notes the importances of a block's structures, and changes nothing."""

    def __init__(self, config: DSAStructuredConfig, structures: Mapping[str, Structures]):
        self.config, self.structures = config, structures
        self.importance = IMPORTANCES[config.importance]
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
                    parts = parts_of(walked, each, group.statistics.get(weight.name), self.config.damping)
                    self.scores[each.unit] = self.importance(parts).float().cpu()
                walked.done(weight, group)


def dense_scores(
    model: nn.Module,
    architecture: Architecture,
    calibration: Calibration,
    config: DSAStructuredConfig,
    structures: Mapping[str, Structures],
) -> dict[str, Tensor]:
    """Unit -> importances of its structures in the model as it is, (structures,) float32 on the CPU."""
    take = TakeScores(config, structures)
    run_steps(model, architecture, calibration, config, [take], lambda walked: None)
    return {unit: take.scores[unit] for unit in structures}
