"""What can be tried: candidates, and the space they are sampled from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..common.registry import Registry
from ..common.values import is_number, is_whole, short
from ..pruning.allocation import ALLOCATIONS, POST_PROCESS, PRE_PROCESS, REDUCTION, TRANSFORM, AllocationFunction
from ..pruning.structured.widths.shares import SHARES


DSA = "https://github.com/lliai/DSA"


@dataclass(frozen=True)
class Candidate:
    """Something that becomes an allocation.

    Attributes:
        function (`str`): a name of `ALLOCATIONS` or the text of an allocation function; with `counts`, where they are
            from.
        spread (`float`): half-width instead of the function's own.
        granularity (`str`): "block" or "matrix".
        offsets (`tuple`): kind of weight (its path inside the block) -> sparsity added to what the function gives.
        counts (`tuple[int, ...]`): weights to remove per matrix, in the order of the model; of the allocation nothing
            else counts then.
        metric (`str`): what says which weights go, as `DSAConfig.metric` takes it, instead of the config's.
    """

    function: str = "uniform"
    spread: float | None = None
    granularity: str = "block"
    offsets: tuple[tuple[str, float], ...] = ()
    counts: tuple[int, ...] | None = None
    metric: str | None = None

    def __str__(self) -> str:
        parts = [self.function]
        if self.spread is not None:
            parts.append(f"spread {self.spread:.3g}")
        if self.granularity != "block":
            parts.append(f"per {self.granularity}")
        parts += [f"{kind.rpartition('.')[2]} {value:+.3f}" for kind, value in self.offsets if value]
        if self.metric is not None:
            parts.append(f"by {self.metric}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as JSON values."""
        data: dict[str, Any] = {"function": self.function}
        if self.spread is not None:
            data["spread"] = self.spread
        if self.granularity != "block":
            data["granularity"] = self.granularity
        if self.offsets:
            data["offsets"] = dict(self.offsets)
        if self.counts is not None:
            data["counts"] = list(self.counts)
        if self.metric is not None:
            data["metric"] = self.metric
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The candidate in `to_dict`'s form; `ValueError` where a value cannot be a candidate's."""
        if not isinstance(data, Mapping):
            raise ValueError(f"A candidate is an object, got {short(data)}.")
        function, spread, counts = data.get("function", "uniform"), data.get("spread"), data.get("counts")
        granularity, offsets = data.get("granularity", "block"), data.get("offsets", {})
        metric = data.get("metric")
        fits = {
            "function": isinstance(function, str),
            "spread": spread is None or is_number(spread),
            "granularity": granularity in ("block", "matrix"),
            "offsets": isinstance(offsets, Mapping) and all(map(is_number, offsets.values())),
            "counts": counts is None or (isinstance(counts, list) and all(map(is_whole, counts))),
            "metric": isinstance(metric, str | None),
        }
        for name, right in fits.items():
            if not right:
                raise ValueError(f"A candidate cannot have {name}={short(data[name])}.")
        counts = None if counts is None else tuple(counts)
        return cls(function, spread, granularity, tuple(offsets.items()), counts, metric)


def _all(table: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(set(table) - {"no_op"}))


def _all_of(table: Registry, reference: str) -> tuple[str, ...]:
    return tuple(name for name in _all(table) if table.references[name] == reference)


def _cheap_reductions() -> tuple[str, ...]:
    """All but those that take a spectrum of every matrix, seconds per function."""
    return tuple(name for name in _all(REDUCTION) if not REDUCTION.fact(name, "spectrum"))


@dataclass(frozen=True)
class SearchSpace:
    """The functions that a search may try: names per stage, and the ranges of the numeric genes.

    Operations that a user registered are in by themselves. Every sample, child and mutant is a valid function.

    Attributes:
        pre_process (`tuple[str, ...]`): names that may be used first.
        reduction (`tuple[str, ...]`): names of reductions that may be used.
        transform (`tuple[str, ...]`): names that may be used on a unit's number.
        post_process (`tuple[str, ...]`): names that may be used last.
        signs (`tuple[int, ...]`): of the map from number to sparsity.
        spreads (`tuple[float, float]`): lowest and highest half-width.
        kinds (`tuple[str, ...]`): kinds of weight that get an offset of their own; none by default.
        offset (`float`): largest offset, in sparsity.
        granularities (`tuple[str, ...]`): "block", "matrix".
    """

    pre_process: tuple[str, ...] = field(default_factory=lambda: _all(PRE_PROCESS))
    reduction: tuple[str, ...] = field(default_factory=_cheap_reductions)
    transform: tuple[str, ...] = field(default_factory=lambda: _all(TRANSFORM))
    post_process: tuple[str, ...] = field(default_factory=lambda: ("no_op", *_all(POST_PROCESS)))
    signs: tuple[int, ...] = (-1, 1)
    spreads: tuple[float, float] = (0.02, 0.25)
    kinds: tuple[str, ...] = ()
    offset: float = 0.15
    granularities: tuple[str, ...] = ("block",)

    @classmethod
    def published(cls) -> SearchSpace:
        """The space of the published code, https://github.com/lliai/DSA: one sign, one spread, no post-process."""
        return cls(
            *(_all_of(table, DSA) for table in (PRE_PROCESS, REDUCTION, TRANSFORM)),
            post_process=("no_op",),
            signs=(1,),
            spreads=(0.08, 0.08),
        )

    def sample(self, rng: random.Random) -> Candidate:
        """A random candidate: 0–2 pre-process operations, one reduction, 1–2 transforms, 0–1 post-process."""
        return Candidate(
            str(self._function(rng)),
            granularity=rng.choice(self.granularities),
            offsets=tuple((kind, rng.uniform(-self.offset, self.offset)) for kind in self.kinds),
        )

    def _function(self, rng: random.Random) -> AllocationFunction:
        return AllocationFunction(
            tuple(rng.choices(self.pre_process, k=rng.randint(0, 2))),
            rng.choice(self.reduction),
            tuple(rng.choices(self.transform, k=rng.randint(0, 2))),
            rng.choice(self.post_process) if rng.random() < 0.5 else "no_op",
            rng.choice(self.signs),
            round(rng.uniform(*self.spreads), 4),
        )

    def cross(self, a: Candidate, b: Candidate, rng: random.Random) -> Candidate:
        """A child that takes each gene from one of two parents; a named allocator is passed on whole."""
        first, second = function_of(a), function_of(b)
        if first is None or second is None:
            function, spread = rng.choice(((a.function, a.spread), (b.function, b.spread)))
        else:
            genes = ("pre_process", "reduction", "transform", "post_process", "sign", "spread")
            child = replace(first, **{gene: getattr(rng.choice((first, second)), gene) for gene in genes})
            function, spread = str(child), None
        offsets_a, offsets_b = dict(a.offsets), dict(b.offsets)
        offsets = tuple((k, rng.choice((offsets_a.get(k, 0.0), offsets_b.get(k, 0.0)))) for k in self.kinds)
        return Candidate(function, spread, rng.choice((a.granularity, b.granularity)), offsets, metric=a.metric)

    def mutate(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """The candidate with one gene changed: drawn anew, or moved where it is a number."""
        parsed = function_of(candidate)
        genes = ["spread", "spread"] + (["offsets"] * 2 if self.kinds else [])
        if parsed is not None:
            genes += ["pre_process", "reduction", "transform", "post_process", "sign"]
        gene = rng.choice(genes)
        if gene == "offsets":
            values = dict(candidate.offsets)
            kind = rng.choice(self.kinds)
            moved = values.get(kind, 0.0) + rng.gauss(0, self.offset / 3)
            values[kind] = round(min(max(moved, -self.offset), self.offset), 4)
            return replace(candidate, offsets=tuple((k, values.get(k, 0.0)) for k in self.kinds))
        if gene == "spread":
            spread = (parsed.spread if parsed else candidate.spread) or 0.08
            # By a factor: half a width is as near as twice of it.
            spread = round(min(max(spread * 2 ** rng.gauss(0, 0.5), self.spreads[0]), self.spreads[1]), 4)
            if parsed is None:
                return replace(candidate, spread=spread)
            return replace(candidate, function=str(replace(parsed, spread=spread)))
        fresh = getattr(self._function(rng), gene)
        return replace(candidate, function=str(replace(parsed, **{gene: fresh})))


def function_of(candidate: Candidate) -> AllocationFunction | None:
    """The candidate's function; `None` where it is a heuristic that only has a name."""
    if candidate.function in ALLOCATIONS:
        known = ALLOCATIONS[candidate.function]
        if not isinstance(known, AllocationFunction):
            return None
        return known if candidate.spread is None else replace(known, spread=candidate.spread)
    if candidate.function in SHARES:
        return None
    return AllocationFunction.parse(candidate.function)
