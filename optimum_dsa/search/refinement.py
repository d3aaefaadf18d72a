"""Strategies that move the budget between matrices, from an allocation that others found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .problem import GENERATION, STRATEGIES, UNIFORM, Problem, Search, best_of, race
from .space import Candidate
from .trace import Request


@STRATEGIES.register(reference="https://arxiv.org/abs/2410.14649")
def level_switch(
    problem: Problem, offspring: int = GENERATION, quantum: float = 0.05, anchor_every: int = 12
) -> Search:
    """Budget-preserving moves between matrices, from the best so far, after EvoPress.

    A child takes min(U{1..3}, U{1..3}) switches: one matrix gives a quantum of weights back, another gives one up. A
    quantum is at least what both matrices can change by.
    """
    best = problem.start
    if best is None:
        best = best_of((yield from race(problem, [UNIFORM, *map(Candidate, problem.named)])))
    counts = problem.resolver.counts(best)
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
        if generation % anchor_every == 0:
            yield [Request("anchor", Candidate("level_switch", counts=counts))]
    return [Candidate("level_switch", counts=counts), best]


def _switched(counts: list[int], sizes: Sequence[int], step: int, switches: int, problem: Problem) -> tuple[int, ...]:
    config = problem.resolver.config
    low = [math.ceil(config.min_sparsity * size) for size in sizes]
    high = [math.floor(config.max_sparsity * size) for size in sizes]
    least = problem.resolver.steps
    for _ in range(switches):
        giver, taker = problem.rng.sample(range(len(sizes)), 2) if len(sizes) > 1 else (0, 0)
        amount = min(max(step, least[giver], least[taker]), counts[giver] - low[giver], high[taker] - counts[taker])
        if amount > 0:
            counts[giver] -= amount
            counts[taker] += amount
    return tuple(counts)


@STRATEGIES.register()
def descent(
    problem: Problem, step: float = 0.05, windows: int = 16, inertia: float = 0.7, anchor_every: int = 5
) -> Search:
    """Budget moved along the loss's slope per matrix, measured by one backward pass at the sparse point. Ours.

    At the optimum one more weight costs the same in every matrix. A matrix where it costs e times the mean gets `step`
    of sparsity back, with `inertia` from pass to pass; the step shrinks as the budget runs out. Scores are taken anew
    at the current point after every `anchor_every` passes, as in the sequential prune; the last quarter is averaged.
    """
    resolver = problem.resolver
    best = problem.start
    if best is None:
        best = best_of((yield from race(problem, [UNIFORM, *map(Candidate, problem.named)])))
    sizes = torch.tensor(list(resolver.sizes.values()), dtype=torch.float64)
    counts = resolver.counts(best)
    began, windows, start = problem.budget.share, min(windows, problem.windows), 0
    if (room := problem.budget.room(problem.until).tokens) is not None:
        windows = min(windows, max(room // (3 * problem.length), 1))  # a pass costs three tokens for each that it sees
    motion = torch.zeros_like(sizes)
    path: list[tuple[int, ...]] = []
    while not problem.over:
        left = 1 - (problem.budget.share - began) / max(problem.until - began, 1e-9)
        if len(path) % anchor_every == 0:
            yield [Request("anchor", Candidate("descent", counts=counts))]
        start = start if start + windows <= problem.windows else 0
        (trial,) = yield [Request("slopes", Candidate("descent", counts=counts), start, start + windows)]
        start += windows
        if trial.slopes is None:
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
        return [best]
    # The mean of the path is less noisy than its end; both are offered, and the prune decides.
    late = torch.tensor(path[-max(len(path) // 4, 1) :], dtype=torch.float64).mean(0) / sizes
    ends = (resolver.fit(dict(zip(resolver.sizes, late.tolist()))), counts)
    return [*(Candidate("descent", counts=end) for end in dict.fromkeys(ends)), best]
