"""What to try next: search strategies, by name.

A strategy is a generator: what it yields is asked (a list of `Request`s), what it is sent is told (the answering
`Trial`s), and what it returns are its finalists, best first. It draws randomness from one seeded source and reads
nothing but trials, so that replaying the trials of a trace brings it back to where it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..registry import Registry
from .resolve import Resolver
from .space import Candidate, SearchSpace
from .trace import Request, Trial


Search = Generator[list[Request], list[Trial], list[Candidate]]
STRATEGIES = Registry("search strategy")

UNIFORM = Candidate()


@dataclass
class Budget:
    """How much a search may cost, and what it has cost: `None` is no limit."""

    tokens: int | None = None
    evaluations: int | None = None
    seconds: float | None = None
    spent_tokens: int = 0
    spent_evaluations: int = 0
    spent_seconds: float = 0.0

    def add(self, trial: Trial) -> None:
        self.spent_tokens += trial.tokens
        self.spent_evaluations += trial.tokens > 0
        self.spent_seconds += trial.seconds

    @property
    def share(self) -> float:
        """The share of the budget that is spent, by whichever limit is nearest."""
        pairs = (
            (self.spent_tokens, self.tokens),
            (self.spent_evaluations, self.evaluations),
            (self.spent_seconds, self.seconds),
        )
        return max((spent / limit for spent, limit in pairs if limit), default=0.0)


@dataclass
class Problem:
    """What a strategy knows: the space, the sizes, the windows, its part of the budget and its randomness."""

    space: SearchSpace
    resolver: Resolver
    windows: int
    length: int
    budget: Budget
    named: tuple[str, ...]
    rng: random.Random
    until: float = 1.0
    start: Candidate | None = None
    rungs: tuple[int, ...] = field(default=())

    def __post_init__(self):
        if not self.rungs:
            # 2k and 8k tokens, within what there is
            windows = [max(tokens // self.length, 1) for tokens in (2048, 8192)]
            self.rungs = tuple(sorted({min(count, self.windows) for count in windows}))

    @property
    def over(self) -> bool:
        return self.budget.share >= self.until

    def with_share(self, share: float, **changes) -> Problem:
        """The same problem with the budget up to `share` of the whole."""
        return replace(self, until=min(share, self.until), **changes)


@dataclass
class Ranked:
    """A candidate and its mean loss over the windows that it has met."""

    candidate: Candidate
    counts: tuple[int, ...] | None
    loss: float = math.inf
    windows: int = 0


def race(problem: Problem, candidates: Iterable[Candidate], keep: float = 0.34) -> Generator:
    """Candidates meet growing numbers of common windows; after each rung the best share goes on.

    Returns the ranking, best first: those that met more windows come before those that dropped out.
    """
    running = [Ranked(candidate, None) for candidate in candidates]
    out: list[Ranked] = []
    for number, stop in enumerate(problem.rungs):
        start = 0 if number == 0 else problem.rungs[number - 1]
        trials = yield [Request("loss", ranked.candidate, start, stop) for ranked in running]
        survivors = []
        for ranked, trial in zip(running, trials):
            if trial.loss is None:
                continue
            seen = ranked.windows
            ranked.loss = trial.loss if not seen else (ranked.loss * seen + trial.loss * (stop - start)) / stop
            ranked.windows, ranked.counts = stop, trial.counts
            survivors.append(ranked)
        survivors.sort(key=lambda ranked: ranked.loss)
        last = stop == problem.rungs[-1]
        number_kept = len(survivors) if last else max(math.ceil(keep * len(survivors)), min(2, len(survivors)))
        running, dropped = survivors[:number_kept], survivors[number_kept:]
        out = dropped + out
    return running + out


def distinct(ranking: Iterable[Ranked]) -> list[Ranked]:
    """The ranking without candidates that give an allocation once more."""
    seen, kept = set(), []
    for ranked in ranking:
        if ranked.counts not in seen:
            seen.add(ranked.counts)
            kept.append(ranked)
    return kept


def _merge(*rankings: Sequence[Ranked]) -> list[Ranked]:
    found = [ranked for ranking in rankings for ranked in ranking]
    return distinct(sorted(found, key=lambda ranked: (-ranked.windows, ranked.loss)))


@STRATEGIES.register()
def named(problem: Problem) -> Search:
    """Uniform and every named allocator."""
    ranking = yield from race(problem, [UNIFORM, *map(Candidate, problem.named)], keep=1.0)
    return [ranked.candidate for ranked in distinct(ranking)]


@STRATEGIES.register("random", reference="https://github.com/lliai/DSA")
def random_search(problem: Problem, generation: int = 16) -> Search:
    """Functions drawn at random: the paper's baseline."""
    best: list[Ranked] = yield from race(problem, [UNIFORM], keep=1.0)
    while not problem.over:
        drawn = yield from race(problem, [problem.space.sample(problem.rng) for _ in range(generation)])
        best = _merge(best, drawn)[:8]
    return [ranked.candidate for ranked in best]


@STRATEGIES.register(reference="https://github.com/lliai/DSA")
def evolution(problem: Problem, population: int = 16, parents: int = 6, immigrants: int = 3) -> Search:
    """Functions bred from the best: crossover, mutation, elitism, and a few strangers in every generation.

    Generation 0 holds uniform, every named allocator, and random functions.
    """
    space, rng = problem.space, problem.rng
    first = [UNIFORM, *map(Candidate, problem.named)]
    if problem.start is not None:
        first.append(problem.start)
    first += [space.sample(rng) for _ in range(max(population - len(first), immigrants))]
    best = _merge((yield from race(problem, first)))
    while not problem.over:
        breeding = [ranked.candidate for ranked in best[:parents] if ranked.candidate.counts is None]
        children = [space.sample(rng) for _ in range(immigrants)]
        while len(children) < population:
            a, b = rng.choice(breeding), rng.choice(breeding)
            child = space.cross(a, b, rng) if rng.random() < 0.5 else a
            children.append(space.mutate(child, rng))
        best = _merge(best, (yield from race(problem, children)))[: 2 * parents]
    return [ranked.candidate for ranked in best]


@STRATEGIES.register(reference="https://arxiv.org/abs/2502.14770")
def ramp(problem: Problem) -> Search:
    """The width of a linear ramp over depth: a coarse line search, then two halvings around the best."""
    tried: dict[float, Ranked] = {}

    def evaluate(spreads: Iterable[float]) -> Generator:
        fresh = [spread for spread in spreads if spread not in tried]
        candidates = [Candidate("atp", spread) for spread in fresh]
        ranking = yield from race(problem.with_share(1.0), candidates, keep=1.0)
        tried.update({ranked.candidate.spread: ranked for ranked in ranking})

    yield from evaluate((0.0, 0.05, 0.1, 0.15, 0.2))
    step = 0.05
    for _ in range(2):
        step /= 2
        center = min(tried, key=lambda spread: tried[spread].loss)
        yield from evaluate([round(s, 5) for s in (center - step, center + step) if 0 <= s <= 0.5])
    return [ranked.candidate for ranked in _merge(list(tried.values()))]


@STRATEGIES.register(reference="https://arxiv.org/abs/2410.14649")
def level_switch(problem: Problem, offspring: int = 16, quantum: float = 0.05, anchor_every: int = 12) -> Search:
    """Budget-preserving moves between matrices, from the best so far, after EvoPress.

    A child takes min(U{1..3}, U{1..3}) switches: one matrix gives a quantum of weights back, another gives one up.
    """
    best = problem.start
    if best is None:
        ranking = yield from race(problem, [UNIFORM, *map(Candidate, problem.named)])
        best = ranking[0].candidate
    counts = problem.resolver.counts(best)
    yield [Request("anchor", Candidate("level_switch", counts=counts))]
    names = list(problem.resolver.sizes)
    sizes = [problem.resolver.sizes[name] for name in names]
    step = max(int(quantum * min(sizes)), 1)
    generation = 0
    while not problem.over:
        generation += 1
        children = [counts]
        while len(children) <= offspring:
            switches = min(problem.rng.randint(1, 3), problem.rng.randint(1, 3))
            child = _switched(list(counts), sizes, step * problem.rng.choice((1, 2, 4)), switches, problem)
            if child not in children:
                children.append(child)
        candidates = [Candidate("level_switch", counts=child) for child in children]
        ranking = yield from race(problem, candidates, keep=0.2)
        counts = ranking[0].candidate.counts
        if generation % anchor_every == 0:
            yield [Request("anchor", Candidate("level_switch", counts=counts))]
    return [Candidate("level_switch", counts=counts), best]


def _switched(counts: list[int], sizes: Sequence[int], step: int, switches: int, problem: Problem) -> tuple[int, ...]:
    config = problem.resolver.config
    low = [math.ceil(config.min_sparsity * size) for size in sizes]
    high = [math.floor(config.max_sparsity * size) for size in sizes]
    for _ in range(switches):
        giver, taker = problem.rng.sample(range(len(sizes)), 2) if len(sizes) > 1 else (0, 0)
        amount = min(step, counts[giver] - low[giver], high[taker] - counts[taker])
        if amount > 0:
            counts[giver] -= amount
            counts[taker] += amount
    return tuple(counts)


@STRATEGIES.register()
def descent(problem: Problem, steps: int = 24, largest: float = 0.03, windows: int = 32) -> Search:
    """Budget moved along the loss's slope per matrix, measured by one backward pass at the sparse point. Ours.

    In each step the matrices whose next weight costs more than the median give weights back, the others give up more;
    the step shrinks as the budget runs out, and the scores are taken anew at the current point every few steps.
    """
    resolver = problem.resolver
    best = problem.start
    if best is None:
        ranking = yield from race(problem, [UNIFORM, *map(Candidate, problem.named)])
        best = ranking[0].candidate
    sizes = resolver.sizes
    counts = resolver.counts(best)
    sparsity = {name: count / size for (name, size), count in zip(sizes.items(), counts)}
    began = problem.budget.share
    windows = min(windows, problem.windows)
    smooth = dict.fromkeys(sizes, 0.0)
    path: list[tuple[int, ...]] = []
    offset = 0
    while not problem.over:
        done = (problem.budget.share - began) / max(problem.until - began, 1e-9)
        if len(path) % 3 == 0:
            yield [Request("anchor", Candidate("descent", counts=counts))]
        offset = offset if offset + windows <= problem.windows else 0
        (trial,) = yield [Request("slopes", Candidate("descent", counts=counts), offset, offset + windows)]
        offset += windows
        if trial.slopes is None:
            break
        middle = sorted(trial.slopes)[len(trial.slopes) // 2]
        deviation = sorted(abs(slope - middle) for slope in trial.slopes)[len(trial.slopes) // 2] or 1.0
        step = largest * (1 - done) + 0.002
        for name, slope in zip(sizes, trial.slopes):
            pull = min(max((slope - middle) / deviation, -4), 4) / 4
            smooth[name] = 0.5 * smooth[name] + 0.5 * pull
            sparsity[name] -= step * smooth[name]
        counts = resolver.fit(sparsity)
        sparsity = {name: count / size for (name, size), count in zip(sizes.items(), counts)}
        path.append(counts)
    late = path[-max(len(path) // 4, 1) :]
    mean = (
        resolver.fit({n: sum(c[i] for c in late) / len(late) / sizes[n] for i, n in enumerate(sizes)})
        if late
        else counts
    )
    return [Candidate("descent", counts=mean), Candidate("descent", counts=counts), best]


@STRATEGIES.register()
def auto(problem: Problem) -> Search:
    """Named allocators, then the width of a ramp, then evolution, then refinement per matrix, within one budget."""
    found = (yield from named(problem))[:4]
    found += (yield from ramp(problem))[:2]
    evolved = yield from evolution(problem.with_share(0.35, start=found[0]))
    ranking = yield from race(problem, dict.fromkeys([*evolved[:4], *found]), keep=1.0)
    refined = yield from descent(replace(problem, start=ranking[0].candidate))
    return [*refined, *(ranked.candidate for ranked in ranking[:2])]
