"""Strategies that move the budget between matrices, from an allocation that others found."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .problem import STRATEGIES, UNIFORM, Problem, Search, race
from .space import Candidate
from .trace import Request


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
