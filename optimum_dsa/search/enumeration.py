"""All functions of a space at once: the allocations that they give, and how few of them differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..pruning.allocation import PRE_PROCESS, REDUCTION, AllocationFunction
from ..pruning.allocation.budget import fit_counts, round_matrices
from ..pruning.allocation.operations import mean_by_size, singular_values
from .resolver import Resolver
from .space import SearchSpace


Stage = tuple[str, ...]


class Base(NamedTuple):
    """The heavy half of a function: what is computed from scores."""

    pre_process: Stage
    reduction: str


class Numbers(NamedTuple):
    """What the heavy halves give.

    Attributes:
        bases: every pre-process with every reduction.
        values: (bases, units) float64, each base's number of each unit.
    """

    bases: list[Base]
    values: Tensor


class Functions(NamedTuple):
    """All functions of a space.

    Attributes:
        makers: each makes the function of its place: most are never looked at.
        proposals: (functions, units) float64, the sparsity that each would like, before it is fitted to the budget.
    """

    makers: list[Callable[[], AllocationFunction]]
    proposals: Tensor


@dataclass(frozen=True)
class Enumeration:
    """Every allocation of a space, each once.

    Attributes:
        texts (`int`): how many functions can be written down, no_op in any place and published λ 7, 8, 9, 10 included.
        functions (`int`): how many are left when no_op is dropped.
        representatives (`Sequence[AllocationFunction]`): per allocation, the shortest function that gives it.
        sharing (`Tensor`): (allocations,) int64, how many of `functions` give it.
        counts (`Tensor`): (allocations, units) int64, what `prune` would remove per block; all different.
    """

    texts: int
    functions: int
    representatives: Sequence[AllocationFunction]
    sharing: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.representatives)

    def merged(self, sizes: Tensor, tolerance: float, most: int) -> list[AllocationFunction]:
        """Representatives, most shared first, none within `tolerance` (sparsity, in every block) of an earlier one.

        Stops when there are more than `most`.
        """
        sparsity = self.counts / sizes
        left, kept = self.sharing.argsort(descending=True, stable=True), []
        while len(left) and len(kept) <= most:
            kept.append(self.representatives[int(left[0])])
            far = (sparsity[left] - sparsity[left[0]]).abs().amax(1) > tolerance
            # Each kept one takes its neighbours with it, most shared first: a greedy cover.
            left = left[far]
        return kept


def enumerate_space(space: SearchSpace, resolver: Resolver) -> Enumeration:
    """The allocations of all functions of `space`, at block granularity and its lower spread.

    Pre-process and reduction are computed once per unit and per distinct pre-processed scores, everything behind them
    on all functions together.
    """
    pre_processes, transforms = _stages(space.pre_process), _stages(space.transform)
    reductions = tuple(name for name in space.reduction if name != "no_op")
    config = resolver.config
    functions = _functions(space, transforms, _numbers(resolver, pre_processes, reductions), config.sparsity)
    allocations = _removed(resolver, functions.proposals)
    pre, transform = len(space.pre_process) + 1, len(space.transform) + 1
    texts = (1 + pre + pre**2) * (len(reductions) + 1) * (transform + transform**2)
    # functions are listed with the shorter stages first, so that the first of a group is its shortest
    return Enumeration(
        texts * len(set(space.post_process)) * len(space.signs) * 4,
        len(functions.makers),
        [functions.makers[index]() for index in allocations.first.tolist()],
        allocations.sharing,
        allocations.counts,
    )


def block_sizes(resolver: Resolver) -> Tensor:
    """Prunable weights per block, (units,) float64."""
    return torch.tensor([sum(w.size for w in weights) for weights in resolver.units["block"].values()]).double()


class _Distinct(NamedTuple):
    """Different rows, how many each stands for, and the first of those."""

    counts: Tensor
    sharing: Tensor
    first: Tensor

    @classmethod
    def of(cls, rows: Tensor, sharing: Tensor, first: Tensor) -> _Distinct:
        """Rows, (n, units), of which each stands for `sharing` and `first`, (n,), equal ones taken together; int64."""
        found, place = torch.unique(rows, dim=0, return_inverse=True)
        return cls(
            found,
            torch.zeros(len(found), dtype=torch.int64).scatter_add_(0, place, sharing),
            torch.full((len(found),), int(first.max()) + 1).scatter_reduce_(0, place, first, "amin"),
        )


def _removed(resolver: Resolver, proposals: Tensor) -> _Distinct:
    """The allocations of blocks that `prune` would make of proposals, (functions, units)."""
    config = resolver.config
    bounds = config.min_sparsity, config.max_sparsity
    matrices = [[weight.size for weight in weights] for weights in resolver.units["block"].values()]
    counts = round_matrices(fit_counts(proposals, block_sizes(resolver), config.sparsity, *bounds), matrices, *bounds)
    # First as asked: that many functions ask alike makes the slower rounding to a pattern cheap.
    asked = _Distinct.of(counts, torch.ones(len(counts), dtype=torch.int64), torch.arange(len(counts)))
    if max(resolver.steps) == 1:
        return asked
    rounded = torch.tensor([resolver.removed_of_blocks(row) for row in asked.counts.tolist()])
    return _Distinct.of(rounded, asked.sharing, asked.first)


def _stages(names: Sequence[str]) -> list[Stage]:
    names = [name for name in names if name != "no_op"]
    return [stage for length in range(3) for stage in product(names, repeat=length)]


@torch.no_grad()
def _numbers(resolver: Resolver, pre_processes: Sequence[Stage], reductions: Sequence[str]) -> Numbers:
    """The number of every unit under every pre-process and reduction.

    Operations of one score need its value alone, so that what leaves all histogram bins the same (such as abs of a
    score that is never negative) leaves the scores the same.
    """
    units = resolver.units["block"]
    summaries = [resolver.summary("block", unit) for unit in units]
    alike: dict[bytes, list[int]] = {}
    values = []
    for index, stage in enumerate(pre_processes):
        values.append([summary.pre_processed(stage) for summary in summaries])
        key = b"".join(x.numpy().tobytes() for x in values[-1])
        alike.setdefault(key, []).append(index)
    # Only these are reduced; the rest of each group has the same scores, and so the same numbers.
    firsts = [group[0] for group in alike.values()]
    found = torch.empty(len(pre_processes), len(reductions), len(units), dtype=torch.float64)
    columns = {name: column for column, name in enumerate(reductions)}
    cheap = [name for name in reductions if not REDUCTION.fact(name, "matrix")]
    for index in firsts:
        for unit, (summary, x) in enumerate(zip(summaries, values[index])):
            for name in cheap:
                found[index, columns[name], unit] = summary.reduce(name, x)
    of_matrices = [name for name in reductions if REDUCTION.fact(name, "matrix")]
    if of_matrices:
        _reduce_matrices(resolver, [pre_processes[index] for index in firsts], of_matrices, firsts, columns, found)
    for group in alike.values():
        found[group] = found[group[0]].clone()
    return Numbers([Base(*pair) for pair in product(pre_processes, reductions)], found.flatten(0, 1))


def _reduce_matrices(resolver, stages, names, rows, columns, found) -> None:
    """Fill `found` for reductions of matrices: scores are made once per unit, a spectrum once per pre-process."""
    spectra = {name: REDUCTION.fact(name, "spectrum") for name in names}

    def numbers(matrices: Sequence[Tensor]) -> dict[str, float]:
        """Reduction -> its number, of matrices (rows, columns)."""
        # One decomposition serves all reductions of a spectrum: it is what costs seconds.
        singular = [singular_values(matrix) for matrix in matrices] if any(spectra.values()) else ()
        return {
            name: float(
                mean_by_size([spectra[name](s) for s in singular], matrices)
                if spectra[name]
                else REDUCTION[name](matrices)
            )
            for name in names
        }

    # Threads, not processes: torch lets go of the interpreter while it computes, and the scores stay shared.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, (name, weights) in enumerate(resolver.units["block"].items()):
            with resolver.unit(name, weights) as unit:
                scores = unit.flat_scores()

            # Defaults bind this turn of the loop, whatever turn a thread runs in.
            def reduce(stage: Stage, unit=unit, scores=scores) -> dict[str, float]:
                x = scores
                for operation in stage:
                    x = PRE_PROCESS[operation](x)
                return numbers(unit.split(x))

            for row, values in zip(rows, pool.map(reduce, stages)):
                for reduction, value in values.items():
                    found[row, columns[reduction], index] = value


def _functions(space: SearchSpace, transforms: Sequence[Stage], numbers: Numbers, target: float) -> Functions:
    """Every base with every tail; shorter stages come first, so that the first of a group is its shortest."""
    makers, proposals = [], []
    for transform, post_process, sign in product(transforms, dict.fromkeys(space.post_process), space.signs):
        # The reduction of a tail is never asked: it starts from numbers that are there.
        tail = AllocationFunction((), "mean", transform, post_process, sign, space.spreads[0])
        makers += [
            partial(replace, tail, pre_process=base.pre_process, reduction=base.reduction) for base in numbers.bases
        ]
        proposals.append(tail.proposals(numbers.values, target))
    return Functions(makers, torch.cat(proposals))
