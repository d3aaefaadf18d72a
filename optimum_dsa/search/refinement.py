"""Strategies that move the budget between matrices, from an allocation that others found."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from .problem import GENERATION, STRATEGIES, UNIFORM, Problem, Search, distinct, pass_windows, race
from .space import Candidate
from .trace import Request


def _starts(problem: Problem) -> Generator:
    """Where to begin, and what comes behind it: what the problem says, or the named ones as they race."""
    if problem.start is not None:
        return [problem.start]
    ranking = yield from race(problem, [UNIFORM, *map(Candidate, problem.named)])
    return [ranked.candidate for ranked in distinct(ranking)] or [UNIFORM]


@STRATEGIES.register(reference="https://arxiv.org/abs/2410.14649", moves=True)
def level_switch(
    problem: Problem, offspring: int = GENERATION, quantum: float = 0.05, anchor_every: int = 12
) -> Search:
    """Budget-preserving moves between matrices, from the best so far, after EvoPress.

    A child takes min(U{1..3}, U{1..3}) switches: one matrix gives a quantum of weights back, another gives one up. A
    quantum is at least what both matrices can change by.
    """
    best, *others = yield from _starts(problem)
    counts = problem.resolver.counts(best)
    path = [counts]
    yield [Request("anchor", Candidate("level_switch", counts=counts))]
    names = list(problem.resolver.sizes)
    sizes = [problem.resolver.sizes[name] for name in names]
    step = max(int(quantum * min(sizes)), 1)
    generation = 0
    while not problem.over:
        generation += 1
        # The parent races again on the same windows as its children: elitism.
        children = [counts]
        for _ in range(10 * offspring):  # there may be nothing that can be moved
            if len(children) > offspring:
                break
            switches = min(problem.rng.randint(1, 3), problem.rng.randint(1, 3))
            child = _switched(list(counts), sizes, step * problem.rng.choice((1, 2, 4)), switches, problem)
            if child not in children:
                children.append(child)
        candidates = [Candidate("level_switch", counts=child) for child in children]
        ranking = yield from race(problem, candidates, keep=0.2)
        if not ranking:
            break
        counts = ranking[0].candidate.counts
        path.append(counts)
        if generation % anchor_every == 0:
            yield [Request("anchor", Candidate("level_switch", counts=counts))]
    latest = [Candidate("level_switch", counts=place) for place in dict.fromkeys(reversed(path))]
    return [latest[0], best, *latest[1:], *others]


def _switched(counts: list[int], sizes: Sequence[int], step: int, switches: int, problem: Problem) -> tuple[int, ...]:
    low, high, least = problem.resolver.low, problem.resolver.high, problem.resolver.steps
    for _ in range(switches):
        giver, taker = problem.rng.sample(range(len(sizes)), 2) if len(sizes) > 1 else (0, 0)
        amount = min(max(step, least[giver], least[taker]), counts[giver] - low[giver], high[taker] - counts[taker])
        if amount > 0:
            counts[giver] -= amount
            counts[taker] += amount
    return tuple(counts)


@STRATEGIES.register(moves=True)
def descent(
    problem: Problem, step: float = 0.05, windows: int = 16, inertia: float = 0.7, anchor_every: int = 5
) -> Search:
    """Budget moved along the loss's slope per matrix, measured by one backward pass at the sparse point. Ours.

    At the optimum one more weight costs the same in every matrix. A matrix where it costs e times the mean gets `step`
    of sparsity back, with `inertia` from pass to pass; the step shrinks as the budget runs out. Scores are taken anew
    at the current point after every `anchor_every` passes, as in the sequential prune; the last quarter is averaged.
    """
    resolver = problem.resolver
    best, *others = yield from _starts(problem)
    sizes = torch.tensor(list(resolver.sizes.values()), dtype=torch.float64)
    counts = resolver.counts(best)
    began, start = problem.budget.share, 0
    if (room := problem.budget.room(problem.until).tokens) is not None:
        windows = min(windows, max(room // (3 * problem.length), 1))  # one pass at least
    motion = torch.zeros_like(sizes)
    path: list[tuple[int, ...]] = []
    while not problem.over and (seen := pass_windows(problem, windows)):
        left = 1 - (problem.budget.share - began) / max(problem.until - began, 1e-9)
        if len(path) % anchor_every == 0:
            yield [Request("anchor", Candidate("descent", counts=counts))]
        start = start if start + seen <= problem.windows else 0
        (trial,) = yield [Request("slopes", Candidate("descent", counts=counts), start, start + seen)]
        start += seen
        if trial.loss is None or trial.slopes is None:
            break
        slopes = torch.tensor(trial.slopes, dtype=torch.float64)
        # The median: a few steep matrices do not move it. Clamped, as slopes may be negative.
        middle = slopes.median().clamp_min(torch.finfo(torch.float64).tiny)
        # Slopes span orders of magnitude, and negative ones have no logarithm.
        logs = (slopes / middle).clamp_min(0.1).log()
        # Without its weighted mean, so that the budget stays; clipped, so that no matrix runs away.
        pull = (logs - (logs * sizes).sum() / sizes.sum()).clamp(-1.5, 1.5)
        motion = inertia * motion + (1 - inertia) * pull
        proposed = torch.tensor(counts) / sizes - step * (0.1 + 0.9 * left) * motion
        counts = resolver.fit(dict(zip(resolver.sizes, proposed.tolist())))
        path.append(counts)
    if not path:
        return [best, *others]
    # The mean of the path is less noisy than its end; both are offered, and the prune decides.
    late = torch.tensor(path[-max(len(path) // 4, 1) :], dtype=torch.float64).mean(0) / sizes
    ends = (resolver.fit(dict(zip(resolver.sizes, late.tolist()))), counts)
    # Behind them the way there, latest first, should there be room for more finalists.
    places = {place: Candidate("descent", counts=place) for place in [*ends, *reversed(path)]}
    ahead = len(set(ends))
    found = list(places.values())
    return [*found[:ahead], best, *found[ahead:], *others]
