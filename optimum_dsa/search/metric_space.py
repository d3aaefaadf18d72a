"""Metrics that a search may try: expressions drawn, crossed, mutated, and written in one way only."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..pruning.unstructured.symbolic import LEAVES, OPERATIONS, Expression, reads_of_leaves
from .space import Candidate, SearchSpace


# What a search begins with: magnitude, Wanda, the same with the root of the norm, relative importance and activations,
# Pruner-Zero, and gradients alone and blended in.
KNOWN = (
    "abs(W)",
    "mul(abs(W), X)",
    "mul(abs(W), sqrt(X))",
    "mul(add(ratio(abs(W), column_sum(abs(W))), ratio(abs(W), row_sum(abs(W)))), sqrt(X))",
    "mul(square(W), minmax(abs(G)))",
    "mul(abs(W), G)",
    "mul(abs(W), add(X, G))",
)
# Whose value is never negative, and which never lowers one of two such values below the other.
_POSITIVE = frozenset({"abs", "square", "sqrt", "exp", "sigmoid", "softmax", "minmax"})
_RISING = frozenset({"exp", "tanh", "sigmoid", "minmax", "zscore"})  # everywhere
_RISING_FROM_ZERO = frozenset({"abs", "square", "sqrt", "log"})  # of values that are not negative
_EVEN = frozenset({"abs", "square", "sqrt", "log"})  # the same of -x as of x


@dataclass(frozen=True)
class MetricSpace:
    """The expressions that a search may try; each has a W in it, and is simplified.

    Attributes:
        leaves (`tuple[str, ...]`): rows of `LEAVES`.
        operations (`tuple[str, ...]`): rows of `OPERATIONS`.
        depth (`int`): levels of a tree at most.
        size (`int`): operations and leaves of a tree at most.
    """

    leaves: tuple[str, ...] = tuple(LEAVES)
    operations: tuple[str, ...] = tuple(OPERATIONS)
    depth: int = 6
    size: int = 20

    @property
    def known(self) -> tuple[str, ...]:
        """`KNOWN` metrics that these leaves can write, each simplified as all are."""
        trees = map(Expression.parse, KNOWN)
        return tuple(str(simplified(tree)) for tree in trees if tree.leaves <= {*self.leaves})

    @property
    def reads(self) -> str:
        """What of calibration all of them may need."""
        return reads_of_leaves(self.leaves)

    def sample(self, rng: random.Random) -> str:
        """A random metric of two to four levels."""
        return self._first(lambda: self._grown(rng, rng.randint(2, 4)))

    def cross(self, a: str, b: str, rng: random.Random) -> str:
        """`a` with one of its parts replaced by one of `b`'s."""
        first, second = Expression.parse(a), Expression.parse(b)
        return self._first(lambda: self._grafted(first, rng.choice([*second.nodes()]), rng), first)

    def mutate(self, metric: str, rng: random.Random) -> str:
        """The metric with a part drawn anew, an operation replaced by another, one put around a part, or one left out.

        The published search has the first of these alone; small steps are what finds the last percent.
        """
        tree = Expression.parse(metric)
        ways = (self._drawn_anew, self._renamed, self._wrapped, self._unwrapped)
        return self._first(lambda: rng.choice(ways)(tree, rng), tree)

    def _first(self, make: Callable[[], Expression], otherwise: Expression | None = None) -> str:
        """The first of what `make` gives that is a metric of this space, written in one way; else what is there."""
        for _ in range(100):
            found = simplified(make())
            nodes = [*found.nodes()]
            if found.parts and "W" in found.leaves and found.depth <= self.depth and len(nodes) <= self.size:
                return str(found)
        return "abs(W)" if otherwise is None else str(simplified(otherwise))

    def _grown(self, rng: random.Random, depth: int) -> Expression:
        """A random tree of `depth` levels at most."""
        if depth <= 1:
            return Expression(rng.choice(self.leaves))
        # A third of the inner places are leaves, or trees would be full ones alone.
        if rng.random() < 0.33:
            return Expression(rng.choice(self.leaves))
        name = rng.choice(self.operations)
        return Expression(name, tuple(self._grown(rng, depth - 1) for _ in range(OPERATIONS.fact(name, "arity"))))

    def _grafted(self, tree: Expression, part: Expression, rng: random.Random) -> Expression:
        place = rng.randrange(sum(1 for _ in tree.nodes()))
        return _with(tree, place, lambda _: part)

    def _drawn_anew(self, tree: Expression, rng: random.Random) -> Expression:
        return self._grafted(tree, self._grown(rng, rng.randint(1, 3)), rng)

    def _renamed(self, tree: Expression, rng: random.Random) -> Expression:
        def other(node: Expression) -> Expression:
            if not node.parts:
                return Expression(rng.choice(self.leaves))
            same = [n for n in self.operations if OPERATIONS.fact(n, "arity") == len(node.parts)]
            return Expression(rng.choice(same), node.parts)

        return _with(tree, rng.randrange(sum(1 for _ in tree.nodes())), other)

    def _wrapped(self, tree: Expression, rng: random.Random) -> Expression:
        name = rng.choice(self.operations)
        more = tuple(Expression(rng.choice(self.leaves)) for _ in range(OPERATIONS.fact(name, "arity") - 1))
        place = rng.randrange(sum(1 for _ in tree.nodes()))
        return _with(tree, place, lambda node: Expression(name, (node, *more)))

    def _unwrapped(self, tree: Expression, rng: random.Random) -> Expression:
        place = rng.randrange(sum(1 for _ in tree.nodes()))
        return _with(tree, place, lambda node: rng.choice(node.parts) if node.parts else node)


def _with(tree: Expression, place: int, change: Callable[[Expression], Expression]) -> Expression:
    """The tree whose node at `place`, counted as `nodes` gives them, is changed."""
    if place == 0:
        return change(tree)
    parts, at = [], 1
    for part in tree.parts:
        size = sum(1 for _ in part.nodes())
        parts.append(_with(part, place - at, change) if at <= place < at + size else part)
        at += size
    return replace(tree, parts=tuple(parts))


def simplified(tree: Expression) -> Expression:
    """The tree without operations that undo each other, and without what leaves the order of its scores at the root.

    Two that differ in such operations alone are one metric, and are looked at once. The published search removes
    opposing pairs for the same reason (Pruner-Zero, section 3.3).
    """
    tree = _unscaled(_reduced(tree))
    while tree.parts:
        inner = tree.parts[0]
        keeps = tree.name in _RISING or (tree.name in _RISING_FROM_ZERO and _is_positive(inner)) or tree.name == "div"
        if not keeps or not inner.parts or "W" not in inner.leaves:
            break
        tree = _unscaled(inner)
    return tree


def _unscaled(tree: Expression) -> Expression:
    """The tree without factors that are one positive number for a whole matrix, where it is a product."""
    if tree.name not in ("mul", "ratio"):
        return tree
    first, second = map(_unscaled, tree.parts) if tree.name == "mul" else (_unscaled(tree.parts[0]), tree.parts[1])
    if _is_scale(second):
        return first
    return second if tree.name == "mul" and _is_scale(first) else Expression(tree.name, (first, second))


def _is_scale(tree: Expression) -> bool:
    """Whether the tree is a positive number for a whole matrix: the sum of what is of inputs alone."""
    return tree.name == "row_sum" and tree.leaves == {"X"} and _is_positive(tree)


def _reduced(tree: Expression) -> Expression:
    """The tree with the same values, as far as float32 tells, and fewer operations."""
    if not tree.parts:
        return tree
    parts = tuple(_reduced(part) for part in tree.parts)
    name, inner = tree.name, parts[0]
    if name in ("add", "mul"):
        parts = tuple(sorted(parts, key=str))
    if name == "mul" and parts[0] == parts[1]:
        return _reduced(Expression("square", parts[:1]))
    if name in _EVEN and inner.name in ("neg", "abs"):
        return _reduced(Expression(name, inner.parts))
    if name == "abs" and _is_positive(inner):
        return inner
    if (name, inner.name) in (("square", "sqrt"), ("sqrt", "square")):
        return _reduced(Expression("abs", inner.parts))
    if name == inner.name == "neg":
        return inner.parts[0]
    if name == "neg" and inner.name == "sub":
        return Expression("sub", inner.parts[::-1])
    # Both take away what a shift and a positive factor do.
    if name in ("minmax", "zscore") and inner.name in ("minmax", "zscore"):
        return Expression(name, inner.parts)
    return Expression(name, parts)


def _is_positive(tree: Expression) -> bool:
    """Whether no value of the tree is negative, whatever it is of."""
    if tree.name in ("add", "mul", "ratio"):
        return all(map(_is_positive, tree.parts))
    if tree.name in ("row_sum", "column_sum", "div"):
        return _is_positive(tree.parts[0])
    return tree.name in _POSITIVE or tree.name in ("X", "G")


@dataclass(frozen=True)
class MetricGenes:
    """Candidates whose one gene is their metric, at one allocation: what evolution breeds in `symbolic`.

    Attributes:
        metrics (`MetricSpace`): what they are drawn from.
        at (`Candidate`): the allocation.
    """

    metrics: MetricSpace
    at: Candidate

    def sample(self, rng: random.Random) -> Candidate:
        """The allocation with a random metric."""
        return replace(self.at, metric=self.metrics.sample(rng))

    def cross(self, a: Candidate, b: Candidate, rng: random.Random) -> Candidate:
        """A child of both metrics; of one that has none, the other's."""
        return replace(self.at, metric=crossed(self.metrics, a, b, rng))

    def mutate(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """The candidate with its metric changed, or with one where it has none."""
        return replace(candidate, metric=mutated(self.metrics, candidate, rng))


@dataclass(frozen=True)
class JointGenes:
    """Candidates of a metric and an allocation function: what evolution breeds in `joint`.

    Attributes:
        metrics (`MetricSpace`): what metrics are drawn from.
        allocations (`SearchSpace`): and allocations.
    """

    metrics: MetricSpace
    allocations: SearchSpace

    def sample(self, rng: random.Random) -> Candidate:
        """A random allocation function with a random metric; in half of them the metric is a known one."""
        known = rng.random() < 0.5
        metric = rng.choice(self.metrics.known) if known else self.metrics.sample(rng)
        return replace(self.allocations.sample(rng), metric=metric)

    def cross(self, a: Candidate, b: Candidate, rng: random.Random) -> Candidate:
        """A child of both: the metric of one with the allocation of the other, or each of both crossed."""
        if rng.random() < 0.5:
            return replace(a, metric=b.metric)
        return replace(self.allocations.cross(a, b, rng), metric=crossed(self.metrics, a, b, rng))

    def mutate(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """The candidate with its metric or its allocation changed."""
        if rng.random() < 0.5:
            return replace(candidate, metric=mutated(self.metrics, candidate, rng))
        return self.allocations.mutate(candidate, rng)


def crossed(space: MetricSpace, a: Candidate, b: Candidate, rng: random.Random) -> str | None:
    """A metric of those of two candidates; the config's own, which has no tree, is passed on whole."""
    if a.metric is None or b.metric is None:
        return rng.choice((a.metric, b.metric))
    return space.cross(a.metric, b.metric, rng)


def mutated(space: MetricSpace, candidate: Candidate, rng: random.Random) -> str:
    """Another metric: the candidate's own with a part changed, or a known one where it has none."""
    return rng.choice(space.known) if candidate.metric is None else space.mutate(candidate.metric, rng)
