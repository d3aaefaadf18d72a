"""What to try next: search strategies, by name."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import Protocol

from ..pruning.unstructured.symbolic import PRUNER_ZERO
from . import curves, optishear  # noqa: F401 - rows of the table
from .enumeration import block_sizes, enumerate_space
from .metric_space import JointGenes, MetricGenes
from .problem import GENERATION, STRATEGIES, UNIFORM, Problem, Ranked, Search, best_of, distinct, merge, race
from .refinement import descent
from .space import DSA, Candidate, SearchSpace


class Genes(Protocol):
    """What candidates are bred by: each of its answers is a valid candidate, drawn with `rng` alone."""

    def sample(self, rng: random.Random) -> Candidate:
        """A random one."""

    def cross(self, a: Candidate, b: Candidate, rng: random.Random) -> Candidate:
        """A child of two."""

    def mutate(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """One with a gene changed."""


@STRATEGIES.register()
def named(problem: Problem) -> Search:
    """Uniform and every named allocator."""
    ranking = yield from race(problem, [UNIFORM, *map(Candidate, problem.named)], keep=1.0)
    return [ranked.candidate for ranked in distinct(ranking)]


@STRATEGIES.register("random", reference=DSA, named=False)
def random_search(problem: Problem, generation: int = GENERATION) -> Search:
    """Functions drawn at random: the paper's baseline."""
    best: list[Ranked] = yield from race(problem, [UNIFORM], keep=1.0)
    while not problem.over:
        drawn = yield from race(problem, [problem.space.sample(problem.rng) for _ in range(generation)])
        best = merge(best, drawn)[:8]
    return [ranked.candidate for ranked in best]


@STRATEGIES.register(reference=DSA)
def evolution(problem: Problem, population: int = GENERATION, parents: int = 6, immigrants: int = 3) -> Search:
    """Functions bred from the best: crossover, mutation, elitism, and a few strangers in every generation.

    Generation 0 holds uniform, every named allocator, and random functions.
    """
    if problem.over and problem.start is not None:
        return [problem.start]
    first = [UNIFORM, *map(Candidate, problem.named)]
    if problem.start is not None:
        first.append(problem.start)
    return (yield from breed(problem, problem.space, first, population, parents, immigrants))


def breed(
    problem: Problem,
    space: Genes,
    first: list[Candidate],
    population: int = GENERATION,
    parents: int = 6,
    immigrants: int = 3,
) -> Search:
    """Generations of candidates from `first` and strangers on: crossed, mutated, the best of all kept."""
    rng = problem.rng
    first += [space.sample(rng) for _ in range(max(population - len(first), immigrants))]
    best = merge((yield from race(problem, first)))
    while not problem.over:
        breeding = [ranked.candidate for ranked in best[:parents] if _has_genes(ranked.candidate)] or [UNIFORM]
        children = [space.sample(rng) for _ in range(immigrants)]
        while len(children) < population:
            a, b = rng.choice(breeding), rng.choice(breeding)
            child = space.cross(a, b, rng) if rng.random() < 0.5 else a
            children.append(space.mutate(child, rng))
        best = merge(best, (yield from race(problem, children)))[: 2 * parents]
    return [ranked.candidate for ranked in best]


def _has_genes(candidate: Candidate) -> bool:
    """Whether there is anything to cross: counts per matrix have no genes, and a metric beside them has."""
    return candidate.counts is None or candidate.metric is not None


@STRATEGIES.register(reference=PRUNER_ZERO, named=False, metrics=True, fixed=True)
def symbolic(problem: Problem, population: int = GENERATION) -> Search:
    """Metrics bred from the best, expressions as trees, at one allocation: crossover, mutation, elitism, strangers.

    Generation 0 holds the config's own metric, the published ones and random ones.
    """
    at = problem.start or UNIFORM
    genes = MetricGenes(problem.metrics, at)
    first = [at, *(replace(at, metric=metric) for metric in problem.metrics.known)]
    return (yield from breed(problem, genes, first, population))


@STRATEGIES.register(reference=PRUNER_ZERO, metrics=True)
def joint(problem: Problem, population: int = GENERATION) -> Search:
    """A metric and an allocation function together, bred from the best: either changes, or both.

    Generation 0 holds the published metrics at uniform, the named allocations under the config's metric, and random
    pairs.
    """
    genes = JointGenes(problem.metrics, problem.space)
    first = [UNIFORM, *map(Candidate, problem.named), *(Candidate(metric=each) for each in problem.metrics.known)]
    return (yield from breed(problem, genes, first, population))


@STRATEGIES.register(reference=DSA, named=False)
def exhaustive(problem: Problem) -> Search:
    """All distinct allocations of the published space, raced from one window on.

    Where the budget does not hold all, those that differ little in every block are taken together.
    """
    resolver, budget = problem.resolver, problem.budget
    everything = enumerate_space(SearchSpace.published(), resolver)
    most = 2000
    if budget.tokens:
        # Half of the budget for the first rung, a window each; the rest for those that go on.
        most = int(budget.tokens * problem.until / problem.length / 2)
    elif budget.evaluations:
        most = int(budget.evaluations * problem.until / 2)
    tolerance = 0.0025
    kept = everything.representatives
    while len(kept) > max(most, 1):
        tolerance *= 2
        kept = everything.merged(block_sizes(resolver), tolerance, max(most, 1))
    problem.notes.append(
        f"the published space: {everything.texts:,} texts, {everything.functions:,} functions, {len(everything):,} "
        f"distinct allocations; {len(kept):,} that differ by more than {tolerance:.2%} of a block were raced"
    )
    rungs = tuple(sorted({min(windows, problem.windows) for windows in (1, 4, 16, 64)}))
    candidates = [UNIFORM, *(Candidate(str(function)) for function in kept)]
    ranking = yield from race(replace(problem, rungs=rungs), candidates, keep=0.15)
    return [ranked.candidate for ranked in distinct(ranking)]


@STRATEGIES.register(reference="https://arxiv.org/abs/2502.14770", named=False)
def ramp(problem: Problem) -> Search:
    """The width of a linear ramp over depth: a coarse line search, then two halvings around the best."""
    tried: dict[float, Ranked] = {}

    def evaluate(spreads: Iterable[float]) -> Generator:
        fresh = [spread for spread in spreads if spread not in tried and not problem.over]
        # "atp" is the linear ramp; its spread is the slope that the paper searches for.
        candidates = [Candidate("atp", spread) for spread in fresh]
        ranking = yield from race(problem.with_share(1.0), candidates, keep=1.0)
        tried.update({ranked.candidate.spread: ranked for ranked in ranking})

    yield from evaluate((0.0, 0.05, 0.1, 0.15, 0.2))
    step = 0.05
    for _ in range(2 if tried else 0):
        step /= 2
        center = min(tried, key=lambda spread: tried[spread].loss)
        yield from evaluate([round(s, 5) for s in (center - step, center + step) if s >= 0])
    return [ranked.candidate for ranked in merge(list(tried.values()))]


@STRATEGIES.register(moves=True)
def auto(problem: Problem) -> Search:
    """Named allocators, then the width of a ramp, then evolution, then refinement per matrix, within one budget."""
    found = (yield from named(problem))[:4]
    found += (yield from ramp(problem))[:2]
    evolved = yield from evolution(problem.with_share(0.3, start=found[0] if found else UNIFORM))
    # Once more together, for one ranking of all stages: what is known costs nothing.
    ranking = yield from race(problem, dict.fromkeys([*evolved[:4], *found]), keep=1.0)
    refined = yield from descent(replace(problem, start=best_of(ranking)))
    others = [ranked.candidate for ranked in ranking]
    return [*refined[:3], *others[:2], *refined[3:], *others[2:]]
