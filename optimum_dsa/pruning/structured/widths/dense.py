"""What the dense model shows of its structures before any goes: importances, variation, error curves; as asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....model.architecture import Architecture, Block
from ....model.statistics import LayerStatistics
from ....model.walk import Reads, WalkedBlock, reads_of, walk_blocks
from ...allocation import Allocation, Allocator, Unit
from ...calibration import Calibration
from ...source import progress
from ..budget import Available
from ..configuration import DSAStructuredConfig
from ..gradients import Products, collect_products
from ..importance import IMPORTANCES, Parts
from ..instead import computing_with, matrices_without
from ..remove import parts_of, scores_from
from ..scores import products_of
from ..structure import WHOLE, Found, Structures
from ..wholes.entire import worth_of
from ..wholes.remove import scores_of_wholes
from .costs import COSTS, TIMED, Cost
from .curves import error_curve
from .felt import PROBE, Felt
from .latency import kept


PARTS = 8  # of the calibration data, over which an importance's variation is taken
_TIED = "its heads go alike from all blocks, which share a tensor of them: with layout='uniform', without a learner"
# (parts of a unit, the walked block, its statistics by weight) -> anything
Look = Callable[[Structures, Parts, WalkedBlock], Any]


@dataclass(frozen=True)
class Dense:
    """A dense model whose structures are to be allocated; each of its properties is a walk over the blocks, made once.

    Attributes:
        units: unit -> its structures, of the kinds that may go.
        sizes: unit -> how many there are, what one costs, how many can go at most.
        asked: what goes of the cost.
        costs: by name, what else of the model could be counted.
        left: weights that no structure owns a part of -> why.
        known: what was found once, whatever the allocation.
    """

    model: nn.Module
    architecture: Architecture
    calibration: Calibration
    config: DSAStructuredConfig
    units: Mapping[str, Structures]
    sizes: Mapping[str, Available]
    asked: int
    costs: Mapping[str, Cost]
    left: Mapping[str, str]
    known: dict[str, dict] = field(default_factory=dict, repr=False)

    @property
    def share(self) -> float:
        """The share of the structures that goes where all units lose alike."""
        return min(self.asked / max(sum(unit.count * unit.cost for unit in self.sizes.values()), 1), 1.0)

    def at(self, sparsity: float) -> Dense:
        """The same model, and what is known of it, with another share to go."""
        return self.under(replace(self.config, sparsity=sparsity))

    def under(self, config: DSAStructuredConfig) -> Dense:
        """The same model, and what is known of it, under a configuration with another allocation or sparsity."""
        return replace(self, config=config, asked=int(config.sparsity * self.costs[config.cost].total))

    def _once(self, name: str, find: Callable[[], dict]) -> dict:
        if name not in self.known:
            self.known[name] = find()
        return self.known[name]

    @property
    def kinds(self) -> dict[str, list[str]]:
        """Kind -> its units."""
        found: dict[str, list[str]] = {}
        for unit, structures in self.units.items():
            found.setdefault(structures.kind, []).append(unit)
        return found

    @property
    def importances(self) -> dict[str, Tensor]:
        """Unit -> the importances of its structures, (structures,) float32."""
        return self._once("importances", self._importances)

    @property
    def importances_by_part(self) -> dict[str, Tensor]:
        """Unit -> the importances of its structures by each part of the calibration data, (parts, structures)."""

        def find() -> dict[str, Tensor]:
            each = [self._importances(part) for part in self._parts()]
            return {unit: torch.stack([scores[unit] for scores in each]) for unit in self.units}

        return self._once("importances by part", find)

    def _importances(self, batches: Sequence[Mapping[str, Tensor]] | None = None) -> dict[str, Tensor]:
        if batches is None:
            products = self.products
        else:
            given = [one for batch in batches for one in _each_of(batch)]
            products = products_of(self.model, self.units, given, self.config)

        def importance(structures: Structures, parts: Parts, walked: WalkedBlock) -> Tensor:
            return self.importance(parts, structures, products)

        wholes = {unit: each for unit, each in self.units.items() if each.kind in WHOLE}
        found = self.looked(importance, self.reads, batches) if len(wholes) < len(self.units) else {}
        if wholes:
            given = self.calibration.batches(self.config.batch_size) if batches is None else batches
            scores = scores_of_wholes(self.model, wholes, given, self.config, products)
            found |= {unit: one.float().cpu() for unit, one in scores.items()}
        return {unit: found[unit] for unit in self.units}

    @property
    def worth(self) -> dict[str, float]:
        """Unit -> how important all of it is, of units that go with all of their structures or none."""
        return self._once("worth", lambda: worth_of(self))

    @property
    def products(self) -> dict[str, list[Products]]:
        """Unit -> weights times gradients, where importances read them."""
        batches = self.calibration.batches(1)
        return self._once("products", lambda: products_of(self.model, self.units, batches, self.config))

    @property
    def fisher(self) -> dict[str, Tensor]:
        """Unit -> Σ w² · F over all that a structure owns, F the loss's Fisher information, (structures,) float32."""

        def find() -> dict[str, Tensor]:
            each = self.products
            if not all(unit in each for unit in self.units):
                batches = self.calibration.batches(1)
                each = collect_products(self.model, self.units, batches, "vectors", self.config.blockwise)
            return {unit: sum(found.second.sum(1) for found in each[unit]).cpu() for unit in self.units}

        return self._once("fisher", find)

    @property
    def curves(self) -> dict[str, Tensor]:
        """Unit -> what is lost by number of structures that go, (structures + 1,) float64.

        The shape is that of the error of what reads them; the scale is how much of it is felt at the end of the model,
        where this unit alone loses the share that all would lose alike.
        """
        return self._once("curves", self._curves)

    def _curves(self) -> dict[str, Tensor]:
        update = self.config.update
        needed = self.reads | {"inputs", "gram"} | ({"mean"} if update == "bias" else set())
        products = self.products  # before the walk that they are looked at in
        felt = Felt(self.model, self.architecture, self.calibration.batches(PROBE)[0])

        def curve(structures: Structures, parts: Parts, walked: WalkedBlock) -> Tensor:
            order = self.importance(parts, structures, products).argsort(stable=True)
            size = self.sizes[structures.unit]
            found = error_curve(parts, order, update)
            number = max(size.allowed(self.share * size.count), min(size.most, 1))
            statistics = parts.statistics if update == "refit" else None
            values = matrices_without(self.model, structures, order[:number], statistics, parts.damping)
            with computing_with(self.model, values):
                change = felt.change()
            return found * (change / float(found[number]) if found[number] else 1.0)

        return self.looked(curve, needed)

    def measured(self, name: str, allocator: Allocator) -> dict[str, Any]:
        """Unit -> what an allocator of unstructured pruning, of some name, sees of it.

        One that reads scores is given the importances of a unit's structures, (structures, 1), and so is any other of
        experts (it looks at the depth); else the matrices that read structures.
        """
        if not self._reads_matrices(allocator):
            depths = {block.name: block.depth for block in self.architecture.blocks}
            return {
                unit: allocator.measure(
                    Unit(unit, depths[self.units[unit].block], [scores[:, None]], [None], lambda weight, _: weight)
                )
                for unit, scores in self.importances.items()
            }

        if name not in self.known.setdefault("measured", {}):
            self.measure({name: allocator})
        return self.known["measured"][name]

    def measure(self, allocators: Mapping[str, Allocator]) -> None:
        """Have `measured` know what all of some allocators, by name, see of matrices: in one walk."""
        asked = {name: each for name, each in allocators.items() if self._reads_matrices(each)}

        def measure(structures: Structures, parts: Parts, walked: WalkedBlock) -> dict[str, Any]:
            weights = [walked.tensor(weight) for weight in readers(walked.block, structures)]
            statistics = [parts.statistics] * len(weights)
            unit = Unit(structures.unit, walked.block.depth, weights, statistics, _no_scores)
            return {name: each.measure(unit) for name, each in asked.items()}

        if asked:
            found = self.looked(measure, set().union(*(reads_of(each.reads) for each in asked.values())))
            known = self.known.setdefault("measured", {})
            known |= {name: {unit: seen[name] for unit, seen in found.items()} for name in asked}

    def _reads_matrices(self, allocator: Allocator) -> bool:
        return allocator.reads != "scores" and all(each.kind not in WHOLE for each in self.units.values())

    @property
    def reads(self) -> Reads:
        """What importances need of calibration."""
        return reads_of(IMPORTANCES.fact(self.config.importance, "reads", "inputs"))

    def importance(self, parts: Parts, structures: Structures, products: Mapping[str, Sequence[Products]]) -> Tensor:
        """The importances of a unit's structures, (structures,) float32."""
        return scores_from(parts, structures, self.config, products).float().cpu()

    def _parts(self) -> list[list[Mapping[str, Tensor]]]:
        """The calibration data's batches in at most `PARTS` parts, of some sequences each."""
        samples = len(next(iter(self.calibration.inputs.values())))
        batches = self.calibration.batches(max(min(samples // PARTS, self.config.batch_size), 1))
        number = min(PARTS, len(batches))
        if number < 2:
            raise ValueError(
                f"allocation={self.config.allocation!r} compares importances from text to text, and one sequence was "
                "given; give more calibration data."
            )
        return [batches[part::number] for part in range(number)]

    @torch.no_grad()
    def looked(self, look: Look, reads: Reads, batches: Sequence[Mapping[str, Tensor]] | None = None) -> dict:
        """Unit -> what `look` makes of it, in the model's order."""
        if reads and batches is None:
            batches = self.calibration.batches(self.config.batch_size)
        found = {}
        for walked in walk_blocks(
            self.model,
            self.architecture,
            batches if reads else None,
            reads=reads,
            sequential=False,
            progress=progress("Allocating"),
        ):
            for unit, structures in self.units.items():
                if structures.block == walked.name and structures.kind not in WHOLE:
                    statistics = _statistics_of(walked, structures)
                    parts = parts_of(walked, structures, statistics, self.config.damping)
                    found[unit] = look(structures, parts, walked)
            # Of one block, and not of two.
            del walked
        return found


def _each_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The samples of a batch, each as a batch of one, (1, length, ...)."""
    samples = len(next(iter(batch.values())))
    return [{name: value[number : number + 1] for name, value in batch.items()} for number in range(samples)]


def readers(block: Block, structures: Structures) -> list:
    """The weights of a block that read its `structures`."""
    names = {cut.tensor for cut in structures.reads}
    return [weight for weight in block.weights if f"{weight.module}.{weight.attribute}" in names]


def _statistics_of(walked: WalkedBlock, structures: Structures) -> LayerStatistics | None:
    return walked.statistics.get(readers(walked.block, structures)[0].name)


def _no_scores(weight: Tensor, statistics: LayerStatistics | None) -> Tensor:
    raise AssertionError("This allocator reads no scores.")


def dense_model(
    model: nn.Module,
    architecture: Architecture,
    calibration: Calibration,
    config: DSAStructuredConfig,
    found: Found,
    times: str | Path | None = None,
) -> Dense:
    """The dense model of which `config` takes a share of its cost, and all the structures `found` in it.

    Args:
        times: folder with what an earlier start of the run timed, if it did.
    """
    length = calibration.facts()["length"] or 0
    whole = _whole(architecture, config)
    asked_for = {unit: each for unit, each in found.structures.items() if each.goes_as in config.structures}
    units = {unit: _without(each, whole) for unit, each in asked_for.items()}
    left = dict(found.left)
    if config.layout != "uniform" or config.learner:
        tied = {unit: each for unit, each in units.items() if each.tied}
        left |= {cut.tensor: _TIED for each in tied.values() for cut in each.cuts}
        units = {unit: each for unit, each in units.items() if unit not in tied}
    # What experts and blocks take of the others, nobody counts.
    whole_ones = any(each.kind in WHOLE for each in units.values())
    needed = {config.cost, *config.least}
    counted = ["parameters"] if whole_ones else [name for name in COSTS if name not in TIMED or name in needed]
    structures = {
        unit: each for unit, each in found.structures.items() if each.kind not in WHOLE or "flops" not in counted
    }
    known = {name: kept(times, units) for name in counted if name in TIMED and times is not None}
    costs = {name: known.get(name) or COSTS[name](model, architecture, structures, length) for name in counted}
    cost = costs[config.cost]
    sizes = {
        unit: Available(
            len(each),
            cost.each[unit],
            len(each) if each.entire else config.round_to if each.kind == "ffn" else 1,
            0 if each.block in whole else len(each) - each.least,
            each.entire,
        )
        for unit, each in units.items()
    }
    asked = int(config.sparsity * cost.total)
    return Dense(model, architecture, calibration, config, units, sizes, asked, costs, left)


def allocation_of(units: Mapping[str, Structures], counts: Mapping[str, int], name: str) -> Allocation:
    """The share of the structures of every unit that goes; its sizes are numbers of structures."""
    sizes = {unit: len(each) for unit, each in units.items()}
    return Allocation({unit: counts[unit] / size for unit, size in sizes.items()}, sizes, name)


def _without(structures: Structures, whole: Collection[str]) -> Structures:
    """Structures of which those that are blocks named in `whole` have to stay."""
    fixed = {*structures.fixed, *(number for number, name in enumerate(structures.wholes) if name in whole)}
    return replace(structures, fixed=tuple(sorted(fixed)), least=max(structures.least, len(fixed)))


def _whole(architecture: Architecture, config: DSAStructuredConfig) -> set[str]:
    """Blocks of which nothing goes: the first and the last of every stack, as many as `config` says."""
    names = set()
    for stack in architecture.stacks:
        blocks = [block.name for block in stack.blocks]
        names |= {*blocks[: config.keep_first], *blocks[len(blocks) - min(config.keep_last, len(blocks)) :]}
    return names
