"""Allocations of structures: matrices without the columns that read them, solved again for every candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture
from ...model.statistics import LayerStatistics
from ...model.walk import WalkedBlock
from ...pruning.allocation import Allocation
from ...pruning.calibration import Calibration
from ...pruning.structured.configuration import DSAStructuredConfig
from ...pruning.structured.importance import Parts
from ...pruning.structured.instead import computing_with, matrices_without
from ...pruning.structured.structure import Structures
from ...pruning.structured.trial import as_pruned, dense_to_try
from ...pruning.structured.wholes.experts import routed_without
from ...pruning.structured.wholes.remove import scores_of_wholes
from ...pruning.structured.widths.latency import keep
from .realisation import REALISATIONS


BAND = 0.04  # half the stretch along which a slope is taken, as a share of a unit's structures


class StructureWidths:
    """The `Realisation` of structured pruning: what reads structures is put in its place as it would be without them.

    Sizes and counts are of the budget's cost: a unit's counts are whole structures of its cost each. From the scores
    at an *anchor*, a model without some structures whose activations they are taken from, follows per unit the order
    in which its structures go, and with `update="refit"` what makes up for them. Nothing is cut.

    Holds X·Xᵀ of what reads each unit, where the matrices are refitted, and while the model is looked at a second copy
    of these matrices.

    Args:
        calibration: feeds statistics, and by its first sample structures are found.
        config: what may go, its importance and update; its allocation is not looked at.
        folder (`Path`, *optional*): where the times of `cost="latency"` are kept.
        resume: take them from there, if they are.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture | None,
        calibration: Calibration | None,
        config: DSAStructuredConfig,
        folder: Path | None = None,
        resume: bool = False,
    ):
        self.model, self.config = model, config
        self.dense = dense_to_try(model, calibration, config, folder if resume else None)
        if folder is not None and "latency" in self.dense.costs:
            keep(folder, self.dense.costs["latency"], self.dense.units)
        self.architecture = self.dense.architecture
        # What costs nothing has nothing to give.
        self.units = {unit: each for unit, each in self.dense.units.items() if self.dense.sizes[unit].cost}
        self.cost = {unit: self.dense.sizes[unit].cost for unit in self.units}
        self.sizes = {unit: len(each) * self.cost[unit] for unit, each in self.units.items()}
        self.steps = {unit: self.dense.sizes[unit].round_to * self.cost[unit] for unit in self.units}
        self._experts = {unit for unit, each in self.units.items() if each.kind == "expert"}
        self.anchor: Mapping[str, int] | None = None
        # at the anchor: unit -> its structures, what goes first first, (structures,), and statistics of their readers
        self._known: dict[str, tuple[Tensor, LayerStatistics | None]] = {}

    def fitted(self, allocation: Allocation) -> Allocation:
        """The allocation itself: whole structures are taken before it is one."""
        return allocation

    def move_anchor(self, counts: Mapping[str, int] | None) -> None:
        """Take scores and statistics from the activations of the model without `counts`; `None`: from the dense."""
        self.anchor, self._known = counts, {}

    def numbers(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Unit -> how many structures go, of its counts in cost."""
        return {unit: round(counts[unit] / cost) for unit, cost in self.cost.items()}

    @contextmanager
    def at(self, counts: Mapping[str, int]) -> Iterator[None]:
        """The model as if `counts` were gone, and made up for from the statistics at the anchor."""
        self._ensure_anchor()
        with self._without(self.numbers(counts)):
            yield

    @contextmanager
    def _without(self, numbers: Mapping[str, int]) -> Iterator[None]:
        """The model as if so many structures of each unit were gone."""
        with ExitStack() as stack:
            stack.enter_context(computing_with(self.model, self._matrices(numbers)))
            for unit in self._experts & numbers.keys():
                gone = self._known[unit][0][: numbers[unit]]
                stack.enter_context(routed_without(self.model, self.units[unit], gone))
            yield

    @contextmanager
    def slopes(self, counts: Mapping[str, int], band: float = BAND) -> Iterator[dict[str, float]]:
        """As `at`; yields unit -> how fast the loss rises with the cost that goes, once the context is left.

        It is the loss's linearisation g · dW, dW being what becomes of a matrix from `band` of its unit's structures
        below the count to `band` above it, and g the gradient there.
        """
        if self._experts:
            raise ValueError(
                f"Experts go whole, and no slope tells of them ({min(self._experts)}); use another strategy."
            )
        self._ensure_anchor()
        numbers, slopes = self.numbers(counts), dict.fromkeys(self.sizes, 0.0)
        flags = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            # Only what reads structures needs gradients: those of all parameters would be another model in memory.
            for parameter in flags:
                parameter.requires_grad_(False)
            held = self._matrices(numbers)
            with torch.enable_grad(), computing_with(self.model, held):
                for name in held:
                    self.model.get_parameter(name).requires_grad_(True)
                yield slopes
                gradients = {name: self.model.get_parameter(name).grad for name in held}
            with torch.no_grad():
                for unit in self.units:
                    slopes[unit] = self._slope(unit, numbers[unit], gradients, band)
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = None

    def _slope(self, unit: str, number: int, gradients: Mapping[str, Tensor | None], band: float) -> float:
        """How fast the loss rises with the cost of a unit, `number` of whose structures are gone."""
        width, most = max(round(band * len(self.units[unit])), 1), self.dense.sizes[unit].most
        fewer, more = max(number - width, 0), min(number + width, max(most, number))
        if more == fewer:
            return 0.0
        before, after = (self._matrices({unit: each}) for each in (fewer, more))
        change = sum(
            float((gradients[name].float() * (after[name].float() - before[name].float())).sum())
            for name in after
            if gradients[name] is not None
        )
        return change / ((more - fewer) * self.cost[unit])

    def errors(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Raises `ValueError`: of structures no error curve is read by a strategy; `allocation="milp"` reads them."""
        raise ValueError("A search of structures reads no error curves; prune with allocation='milp', which does.")

    @contextmanager
    def pruned(self, counts: Mapping[str, int]) -> Iterator[None]:
        """The model as prune would leave it, silenced: its own order and updates, each block after the pruned ones."""
        self._known = {}
        with as_pruned(self.dense, dict.fromkeys(self.dense.units, 0) | self.numbers(counts)):
            yield

    def _matrices(self, numbers: Mapping[str, int]) -> dict[str, Tensor]:
        """Parameter -> what it is once so many structures of each unit are gone, stored as it is."""
        found = {}
        for unit, number in numbers.items():
            order, statistics = self._known[unit]
            gone = order[:number]
            found |= matrices_without(self.model, self.units[unit], gone, statistics, self.config.damping)
        return found

    @torch.no_grad()
    def _ensure_anchor(self) -> None:
        """Have the orders and statistics at the anchor."""
        if self._known:
            return
        self._known = self._looked()
        if self.anchor is not None:
            numbers = self.numbers(self.anchor)
            with self._without(numbers):
                # What is gone there gives nothing, and goes first.
                self._known = self._looked({unit: self._known[unit][0][: numbers[unit]] for unit in self._experts})

    def _looked(self, gone: Mapping[str, Tensor] | None = None) -> dict[str, tuple[Tensor, LayerStatistics | None]]:
        """Unit -> its structures, what goes first first, and statistics of their readers, in the model as it is.

        Args:
            gone (`Mapping[str, Tensor]`, *optional*): unit -> experts that are not in it, (n,) int64.
        """
        dense, refits = self.dense, self.config.update == "refit"
        products = dense.products  # before the walk that they are looked at in

        def look(structures: Structures, parts: Parts, walked: WalkedBlock) -> tuple[Tensor, LayerStatistics | None]:
            order = dense.importance(parts, structures, products).argsort(stable=True)
            return order, parts.statistics if refits else None

        found: dict[str, tuple[Tensor, LayerStatistics | None]] = {}
        if self._experts:
            wholes = {unit: self.units[unit] for unit in self._experts}
            batches = dense.calibration.batches(self.config.batch_size)
            for unit, scores in scores_of_wholes(self.model, wholes, batches, self.config, products).items():
                if gone:
                    scores[gone[unit].to(scores.device)] = -torch.inf
                found[unit] = scores.argsort(stable=True).cpu(), None
        if len(self._experts) < len(self.units):
            found |= dense.looked(look, dense.reads | ({"inputs", "gram"} if refits else set()))
        return {unit: found[unit] for unit in self.units}


REALISATIONS.add("structures", StructureWidths, proxy="matrices solved at once, from the dense model's statistics")
