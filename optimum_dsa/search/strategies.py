"""What to try next: search strategies, by name."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace

from . import curves  # noqa: F401 - a row of the table
from .enumeration import block_sizes, enumerate_space
from .problem import GENERATION, STRATEGIES, UNIFORM, Problem, Ranked, Search, best_of, distinct, merge, race
from .refinement import descent
from .space import DSA, Candidate, SearchSpace


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
    space, rng = problem.space, problem.rng
    if problem.over and problem.start is not None:
        return [problem.start]
    first = [UNIFORM, *map(Candidate, problem.named)]
    if problem.start is not None:
        first.append(problem.start)
    first += [space.sample(rng) for _ in range(max(population - len(first), immigrants))]
    best = merge((yield from race(problem, first)))
    while not problem.over:
        # Counts per matrix have no genes to cross.
        breeding = [ranked.candidate for ranked in best[:parents] if ranked.candidate.counts is None] or [UNIFORM]
        children = [space.sample(rng) for _ in range(immigrants)]
        while len(children) < population:
            a, b = rng.choice(breeding), rng.choice(breeding)
            child = space.cross(a, b, rng) if rng.random() < 0.5 else a
            children.append(space.mutate(child, rng))
        best = merge(best, (yield from race(problem, children)))[: 2 * parents]
    return [ranked.candidate for ranked in best]


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
