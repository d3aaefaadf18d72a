"""The step that takes structures out of a block: which go, and what makes up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.statistics import LayerStatistics
from ...model.walk import Reads, reads_of
from ...model.walked import Group, WalkedBlock
from .configuration import DSAStructuredConfig
from .importance import IMPORTANCES, Parts
from .refit import refit_columns
from .structure import Cut, Structures


class RemoveStructures:
    """Silences the least important structures of a block, and fits what is left; they are cut out in the end.

    The shapes of a block stay as they are while a walk stands at it, so that whatever runs it again can: the dense
    model beside it, training, a resumed walk.

    Args:
        structures: unit -> what there is.
        counts: unit -> how many go.
        chosen: unit -> the numbers of those that go, where that is settled already.
    """

    def __init__(
        self,
        config: DSAStructuredConfig,
        structures: Mapping[str, Structures],
        counts: Mapping[str, int],
        chosen: Mapping[str, Sequence[int]] | None = None,
    ):
        self.config, self.structures, self.counts, self.chosen = config, structures, counts, chosen
        self.importance, self.true_sequential = IMPORTANCES[config.importance], config.true_sequential
        needed = {"refit": "gram", "bias": "mean", "none": "nothing"}[config.update]
        chooses = reads_of(IMPORTANCES.fact(config.importance, "reads", "inputs")) if chosen is None else frozenset()
        self.reads: Reads = reads_of(needed) | chooses
        self.notes: dict[str, Any] = {}  # unit -> the numbers of those that go

    @property
    def gone(self) -> dict[str, Tensor]:
        """Unit -> the numbers of the structures that go, (n,) int64, ascending."""
        return {unit: torch.tensor(numbers, dtype=torch.int64) for unit, numbers in self.notes.items()}

    @torch.no_grad()
    def __call__(self, walked: WalkedBlock) -> None:
        units = {
            structures.reads[0].tensor: structures
            for structures in self.structures.values()
            if structures.block == walked.name
        }
        for group in walked.groups(self.true_sequential):
            for weight in group.weights:
                if (structures := units.get(f"{weight.module}.{weight.attribute}")) is not None:
                    self._remove(walked, structures, group)
                walked.done(weight, group)

    def _remove(self, walked: WalkedBlock, structures: Structures, group: Group) -> None:
        readers = {cut.tensor for cut in structures.reads}
        weights = [weight for weight in walked.weights if f"{weight.module}.{weight.attribute}" in readers]
        statistics = group.statistics.get(weights[0].name)
        columns = structures.reads[0].index
        count, gone = self.counts[structures.unit], torch.zeros(weights[0].shape[1], dtype=torch.bool)
        if count:
            if self.chosen is not None:
                chosen = torch.tensor(self.chosen[structures.unit], dtype=torch.int64)
            else:
                scores = self.importance(parts_of(walked, structures, statistics, self.config.damping))
                # Stable, so that of equals the first go, on every machine.
                chosen = scores.argsort(stable=True)[:count].sort().values
            gone[columns.cpu()[chosen.cpu()].flatten()] = True
            self.notes[structures.unit] = chosen.tolist()
            for weight in weights:
                self._make_up(walked, weight, statistics, gone.to(walked.tensor(weight).device))
                walked.changed(weight)

    def _make_up(self, walked: WalkedBlock, weight: Any, statistics: LayerStatistics | None, gone: Tensor) -> None:
        """Silence the columns `gone`, (in_features,) bool, of a matrix that reads structures, and make up for them."""
        tensor = walked.tensor(weight)
        if self.config.update == "refit":
            tensor.copy_(refit_columns(tensor, statistics, gone, self.config.damping))
            return
        if self.config.update == "bias":
            bias = walked.model.get_submodule(weight.module).bias.data
            bias.add_((tensor[:, gone].float() @ statistics.mean[gone]).to(bias))
            walked.changed(f"{weight.module}.bias")
        tensor.masked_fill_(gone, 0)


def parts_of(walked: WalkedBlock, structures: Structures, statistics: LayerStatistics | None, damping: float) -> Parts:
    """What the structures of a block own of its matrices."""

    def rows(cut: Cut) -> Tensor:
        parameter = walked.model.get_parameter(cut.tensor).data
        return parameter.movedim(cut.axis, 0)[cut.index.to(parameter.device)]

    makes = [rows(cut) for cut in structures.makes if walked.model.get_parameter(cut.tensor).dim() == 2]
    columns = structures.reads[0].index
    columns = columns if statistics is None else columns.to(statistics.squared_sum.device)
    return Parts(makes, [rows(cut) for cut in structures.reads], columns, statistics, damping)
