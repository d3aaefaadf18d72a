"""The step that takes structures out of a block: which go, and what makes up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...model.architecture import Weight
from ...model.statistics import LayerStatistics
from ...model.walk import Reads, reads_of
from ...model.walked import Group, WalkedBlock
from ..targets import dense_target
from .configuration import DSAStructuredConfig
from .gradients import Products
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
        products: unit -> weights times gradients, where the importance reads them.
    """

    def __init__(
        self,
        config: DSAStructuredConfig,
        structures: Mapping[str, Structures],
        counts: Mapping[str, int],
        chosen: Mapping[str, Sequence[int]] | None = None,
        products: Mapping[str, Sequence[Products]] | None = None,
    ):
        self.config, self.structures, self.counts = config, structures, counts
        self.chosen, self.products = chosen or {}, products or {}
        self.true_sequential = config.true_sequential
        needed = {"refit": "gram", "bias": "mean", "none": "nothing"}[config.update]
        self.reads: Reads = reads_of(needed)
        if {*structures} - {*self.chosen}:
            self.reads |= reads_of(IMPORTANCES.fact(config.importance, "reads", "inputs"))
        if config.targets == "dense":
            self.reads |= {"cross_gram", "residual"} if config.residual else {"cross_gram"}
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
        statistics, count = group.statistics.get(weights[0].name), self.counts[structures.unit]
        wanted = {weight.name: self._wanted(walked, weight, group) for weight in weights}
        gone = torch.zeros(weights[0].shape[1], dtype=torch.bool, device=walked.tensor(weights[0]).device)
        columns, left = structures.reads[0].index.to(gone.device), statistics
        settled = self.chosen.get(structures.unit)
        for number in _rounds(count, self.config.rounds if settled is None else 1):
            if settled is not None:
                chosen = torch.tensor(settled, dtype=torch.int64)
            else:
                scores = scores_of(walked, structures, left, self.config, self.products)
                # What went goes again.
                scores = scores.to(gone.device).masked_fill(gone[columns[:, 0]], -torch.inf)
                # Stable, so that of equals the first go, on every machine.
                chosen = scores.argsort(stable=True)[:number].sort().values
            gone[columns[chosen.to(gone.device)].flatten()] = True
            self.notes[structures.unit] = chosen.tolist()
            for weight in weights:
                self._make_up(walked, weight, wanted[weight.name], statistics, gone)
            if number < count and statistics is not None:
                left = statistics.without(gone)
        for weight in weights:
            if count or self.config.targets == "dense":
                walked.changed(weight)

    def _wanted(self, walked: WalkedBlock, weight: Weight, group: Group) -> Tensor:
        """The matrix, (out_features, in_features), whose outputs a refit comes near to.

        That is the live one itself, where nothing else is wanted and it is looked at once.
        """
        tensor, statistics = walked.tensor(weight), group.statistics.get(weight.name)
        if self.config.targets == "dense":
            found = dense_target(tensor, statistics, self.config.damping)
            if found is not tensor:
                tensor.copy_(found)
                return found
        return tensor.clone() if self.config.rounds > 1 and self.config.update == "refit" else tensor

    def _make_up(
        self, walked: WalkedBlock, weight: Weight, wanted: Tensor, statistics: LayerStatistics | None, gone: Tensor
    ) -> None:
        """Silence the columns `gone`, (in_features,) bool, of a matrix that reads structures, and make up for them."""
        tensor = walked.tensor(weight)
        if self.config.update == "refit":
            tensor.copy_(refit_columns(wanted, statistics, gone, self.config.damping))
            return
        if self.config.update == "bias":
            bias = walked.model.get_submodule(weight.module).bias.data
            bias.add_((tensor[:, gone].float() @ statistics.mean[gone]).to(bias))
            walked.changed(f"{weight.module}.bias")
        tensor.masked_fill_(gone, 0)


def _rounds(count: int, rounds: int) -> list[int]:
    """How many are gone after each round, ascending to `count`; of rounds in which nothing goes there is none."""
    return sorted({count * (done + 1) // rounds for done in range(rounds)} - {0})


def scores_of(
    walked: WalkedBlock,
    structures: Structures,
    statistics: LayerStatistics | None,
    config: DSAStructuredConfig,
    products: Mapping[str, Sequence[Products]],
) -> Tensor:
    """The importances of a unit's structures, (structures,) float32."""
    return scores_from(parts_of(walked, structures, statistics, config.damping), structures, config, products)


def scores_from(
    parts: Parts, structures: Structures, config: DSAStructuredConfig, products: Mapping[str, Sequence[Products]]
) -> Tensor:
    """The importances of a unit's structures, (structures,) float32, from what they own."""
    name = f"{config.data.seed}:{structures.unit}"
    return IMPORTANCES[config.importance](replace(parts, products=products.get(structures.unit, ()), name=name))


def parts_of(walked: WalkedBlock, structures: Structures, statistics: LayerStatistics | None, damping: float) -> Parts:
    """What the structures of a block own of its matrices."""

    def rows(cut: Cut) -> Tensor:
        parameter = walked.model.get_parameter(cut.tensor).data
        return parameter.movedim(cut.axis, 0)[cut.index.to(parameter.device)]

    makes = [rows(cut) for cut in structures.makes if walked.model.get_parameter(cut.tensor).dim() == 2]
    columns = structures.reads[0].index
    columns = columns if statistics is None else columns.to(statistics.squared_sum.device)
    return Parts(makes, [rows(cut) for cut in structures.reads], columns, statistics, damping)
