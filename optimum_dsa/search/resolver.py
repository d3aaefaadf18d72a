"""Candidates -> weights to remove per matrix, without looking at a weight again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import nn

from ..common.progress import progress
from ..model.activations import held_in
from ..model.architecture import Weight
from ..model.offload import resident
from ..model.statistics import LayerStatistics
from ..model.walk import Reads, reads_of, walk_blocks
from ..pruning.allocate import floors_of, seen_by_allocator
from ..pruning.allocation import (
    ALLOCATIONS,
    REDUCTION,
    Allocation,
    AllocationFunction,
    Allocator,
    Unit,
    fit_to_budget,
    fit_to_matrices,
    measured_in_one_walk,
)
from ..pruning.calibration import Calibration
from ..pruning.configuration import DSAConfig
from ..pruning.other_head import allocation_for
from ..pruning.unstructured.metrics import METRICS
from .counts import allocation_of, counts_of
from .realise import Realisation
from .space import Candidate, function_of
from .summary import ScoreSummary


class Resolver:
    """Allocations of candidates, from statistics of the dense model that one walk collects.

    Args:
        realisation: what the allocations are of.
        named: rows of `ALLOCATIONS` that candidates may name; each is measured during the walk.
        standing: what `standing_zeros` gives: what no matrix can have fewer zeros than.
    """

    def __init__(
        self,
        model: nn.Module,
        realisation: Realisation,
        calibration: Calibration,
        config: DSAConfig,
        named: Sequence[str] | None = None,
        standing: Mapping[str, int] | None = None,
    ):
        self.model, self.realisation, self.config = model, realisation, config
        self.architecture = realisation.architecture
        self.standing = standing or {}
        self.metric = METRICS[config.allocation_metric]
        self.sizes = realisation.sizes
        self.steps = tuple(realisation.steps.values())  # the least by which each matrix changes, in their order
        # the fewest and the most that each may lose
        self.low = tuple(math.ceil(config.min_sparsity * size) for size in self.sizes.values())
        self.high = tuple(math.floor(config.max_sparsity * size) for size in self.sizes.values())
        self.kinds = {}
        self.units = {granularity: self.architecture.units(granularity) for granularity in ("block", "matrix")}
        self.depths = {}
        self.summaries: dict[str, ScoreSummary] = {}
        self.statistics: dict[str, LayerStatistics] = {}
        self.allocators = {
            name: ALLOCATIONS[name]
            for name in dict.fromkeys(["uniform", "atp", *(measured_in_one_walk() if named is None else named)])
        }
        self.measured: dict[str, dict] = {name: {} for name in self.allocators}
        self._measure = lru_cache(maxsize=None)(self._measure_function)
        self._rounded = lru_cache(maxsize=4096)(self._round)
        self._walk(calibration)

    @torch.no_grad()
    def _walk(self, calibration: Calibration) -> None:
        # X·Xᵀ takes in_features² per matrix; only an allocator that reads it is worth that.
        reads = reads_of(METRICS.fact(self.config.allocation_metric, "reads", "inputs")) | {"inputs"}
        reads |= {read for each in self.allocators.values() for read in _reads_of(each)}
        batches = calibration.batches(self.config.batch_size)
        # Before the walk: they run the model themselves.
        whole = {name: each for name, each in self.allocators.items() if each.reads == "model"}
        for name, allocator in whole.items():
            units = replace(self.config, allocation=name)
            self.measured[name] = allocator.measure_model(
                seen_by_allocator(self.model, self.architecture, calibration, units)
            )
        for walked in walk_blocks(
            self.model,
            self.architecture,
            batches,
            reads=reads,
            sequential=False,
            progress=_shown,
            held=held_in(self.config.activations),
        ):
            tensors = {weight.name: walked.tensor(weight) for weight in walked.weights}
            for weight in walked.weights:
                statistics = walked.statistics[weight.name]
                # Per matrix: summaries of matrices add up to that of their block.
                self.summaries[weight.name] = ScoreSummary.of(self.metric(tensors[weight.name], statistics))
                self.kinds[weight.name] = weight.module.removeprefix(f"{walked.name}.")
            self.depths[walked.name] = walked.block.depth
            for name in self.allocators.keys() - whole:
                allocator = self.allocators[name]
                exact = allocator.granularity == "matrix"
                groups = [(w.name, [w]) for w in walked.weights] if exact else [(walked.name, walked.weights)]
                for unit_name, weights in groups:
                    self.measured[name][unit_name] = allocator.measure(
                        Unit(
                            unit_name,
                            walked.block.depth,
                            [tensors[w.name] for w in weights],
                            [walked.statistics[w.name] for w in weights],
                            self.metric,
                        )
                    )
            for name, statistics in walked.statistics.items():
                statistics.gram = None  # the sums of squares are all that is needed from here on
                self.statistics[name] = statistics

    def counts(self, candidate: Candidate) -> tuple[int, ...]:
        """Weights to ask for per matrix, in the model's order; they add up to the budget.

        Raises:
            ValueError: the candidate has no allocation within the bounds.
        """
        if candidate.counts is not None:
            return candidate.counts
        function = function_of(candidate)
        target = self.config.sparsity
        allocator = self.allocators.get(candidate.function)
        if function is None or (allocator is not None and candidate.granularity == "block"):
            # what goes by a name was measured on the scores themselves, as `allocate` does, others on histograms
            granularity = allocator.granularity or "block"
            proposed = allocator.propose(self.measured[candidate.function], target, candidate.spread)
        else:
            granularity = candidate.granularity
            stages = (function.pre_process, function.reduction, granularity)
            proposed = function.propose(dict(zip(self.units[granularity], self._measure(*stages))), target)
        offsets = dict(candidate.offsets)
        # An offset is per kind of matrix, so that blocks are taken apart first.
        if offsets and granularity == "block":
            blocks = self.units["block"]
            proposed = {w.name: proposed[block] for block, weights in blocks.items() for w in weights}
            granularity = "matrix"
        if offsets:
            proposed = {name: value + offsets.get(self.kinds[name], 0.0) for name, value in proposed.items()}
        return self._fit(proposed, granularity)

    def of_config(self) -> Candidate:
        """The config's own allocation, named or given, as a candidate; `ValueError` where it is of another model."""
        if self.config.allocator is not None:
            return Candidate(self.config.allocation, self.config.spread)
        given = allocation_for(self.architecture, self.config.given_allocation())
        granularity = self.architecture.granularity_of(given.sparsity)
        if granularity not in self.units:
            raise ValueError(
                f"The allocation {given.name!r} names other units than the blocks or matrices of this model; give one "
                "of these, or a name."
            )
        return Candidate(given.name, counts=self._fit(given.sparsity, granularity))

    def removed(self, candidate: Candidate) -> tuple[int, ...]:
        """What `prune` removes per matrix where the candidate's counts are asked for; raises as `counts` does."""
        return self._rounded(self.counts(candidate))

    def _round(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        if max(self.steps) == 1:
            return counts  # every count can be met
        fitted = self.realisation.fitted(self.allocation(counts, "asked for"))
        found = counts_of(fitted, self.units[fitted.granularity])
        return tuple(found[name] for name in self.sizes)

    def removed_of_blocks(self, counts: Sequence[int]) -> tuple[int, ...]:
        """What `prune` removes per block where `counts` are asked for, each block's with one sparsity."""
        sizes = {block: sum(weight.size for weight in weights) for block, weights in self.units["block"].items()}
        shares = {block: count / sizes[block] for block, count in zip(sizes, counts)}
        return tuple(self.realisation.fitted(Allocation(shares, sizes, granularity="block")).counts().values())

    def _fit(self, proposed: dict[str, float], granularity: str) -> tuple[int, ...]:
        units = self.units[granularity]
        sizes = {name: sum(weight.size for weight in weights) for name, weights in units.items()}
        bounds = self.config.min_sparsity, self.config.max_sparsity
        # As `allocate` and a prune's steps hold them: of units first, then of the matrices in each.
        floors = floors_of(units, self.config, self.standing)
        allocation = fit_to_budget(proposed, sizes, self.config.sparsity, *bounds, floors=floors)
        matrices = {name: [weight.size for weight in weights] for name, weights in units.items()}
        allocation = fit_to_matrices(allocation, matrices, *bounds, floors)
        counts = counts_of(allocation, units, self.standing if self.config.resolved.keeps_zeros_in_number else None)
        return tuple(counts[name] for name in self.sizes)

    def fit(self, proposed: dict[str, float]) -> tuple[int, ...]:
        """The counts nearest to a wished-for sparsity per matrix."""
        return self._fit(proposed, "matrix")

    def allocation(self, counts: Sequence[int], name: str) -> Allocation:
        """Counts per matrix as an `Allocation`: per block where all matrices of every block have one sparsity."""
        return allocation_of(dict(zip(self.sizes, counts)), self.units["block"], name)

    @torch.no_grad()
    def _measure_function(self, pre_process: tuple[str, ...], reduction: str, granularity: str) -> tuple[float, ...]:
        """Pre-process and reduction of every unit's scores."""
        values = []
        for unit, weights in self.units[granularity].items():
            if REDUCTION.fact(reduction, "matrix"):
                # of the matrices themselves: their scores are made again from the sums of squares
                with self.unit(unit, weights) as seen:
                    values.append(AllocationFunction(pre_process, reduction).measure(seen))
            else:
                summary = self.summary(granularity, unit)
                values.append(summary.reduce(reduction, summary.pre_processed(pre_process)))
        return tuple(values)

    @contextmanager
    def unit(self, name: str, weights: Sequence[Weight]) -> Iterator[Unit]:
        """What an allocator sees of these weights, as they are."""
        with resident(self.model, list(dict.fromkeys(weight.module for weight in weights))):
            tensors = [weight.tensor(self.model) for weight in weights]
            yield Unit(name, 0.0, tensors, [self.statistics[weight.name] for weight in weights], self.metric)

    @cache  # noqa: B019 - lives as long as the search
    def summary(self, granularity: str, unit: str) -> ScoreSummary:
        """The scores of a block or matrix."""
        return ScoreSummary.merged([self.summaries[weight.name] for weight in self.units[granularity][unit]])


def _reads_of(allocator: Allocator) -> Reads:
    """What it reads itself, beside the scores."""
    return frozenset() if allocator.reads in ("scores", "model") else reads_of(allocator.reads)


def _shown(blocks):
    return progress(blocks, "Reading scores", "block", "optimum_dsa.search")
