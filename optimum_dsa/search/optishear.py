"""A metric's form and the ratios of blocks together, bred by NSGA-III: OptiShear, as a row beside ours."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..pruning.unstructured.symbolic import Expression
from .metric_space import simplified
from .problem import STRATEGIES, UNIFORM, Problem, Ranked, Search, merge, race
from .resolver import Resolver
from .space import Candidate


OPTISHEAR = "https://arxiv.org/abs/2502.10735"
SHAPES = ("{}", "sqrt({})", "square({})", "exp({})", "log({})", "sigmoid({})", "softmax({})")
# What a matrix is divided by. The published code has three more, its sum, mean and norm: one number each, which leaves
# the order of its scores.
SCALES = (None, "row_sum({0})", "column_sum({0})", "add(row_sum({0}), column_sum({0}))")
STEP = 0.05  # by which a block may ask for more or less than the target
DIVISIONS = 12  # of the line between both objectives, into reference points


@dataclass(frozen=True)
class Individual:
    """Genes, each a place in its list.

    Attributes:
        form: places in `SHAPES` of |W| and of ‖x‖, and in `SCALES` of |W| and of ‖x‖².
        ratios: per block, 0 to 2: the target less `STEP`, the target, and more.
    """

    form: tuple[int, ...]
    ratios: tuple[int, ...]

    @classmethod
    def drawn(cls, blocks: int, rng: random.Random) -> Individual:
        """A random one."""
        return cls(tuple(map(rng.randrange, _FORMS)), tuple(rng.randrange(3) for _ in range(blocks)))

    @property
    def metric(self) -> str:
        """The expression that the form stands for, (F(|W|) / c(|W|)) · (F(‖x‖) / c(‖x‖²)), written in one way."""
        of_weight, of_input, scale, input_scale = self.form
        parts = (
            _scaled(SHAPES[of_weight].format("abs(W)"), SCALES[scale], "abs(W)"),
            _scaled(SHAPES[of_input].format("X"), SCALES[input_scale], "square(X)"),
        )
        return str(simplified(Expression.parse(f"mul({', '.join(parts)})")))

    def shares(self, target: float) -> list[float]:
        """The sparsity that every block asks for."""
        return [target + (ratio - 1) * STEP for ratio in self.ratios]

    def child(self, other: Individual, rng: random.Random) -> Individual:
        """Every gene from one of both with equal odds, nine times in ten; then each drawn anew once in as many."""
        mine, theirs = (*self.form, *self.ratios), (*other.form, *other.ratios)
        crossed = rng.random() < 0.9
        genes = [rng.choice(pair) if crossed else pair[0] for pair in zip(mine, theirs)]
        limits = (*_FORMS, *(3 for _ in self.ratios))
        genes = [rng.randrange(limit) if rng.random() < 1 / len(genes) else gene for gene, limit in zip(genes, limits)]
        return Individual(tuple(genes[: len(_FORMS)]), tuple(genes[len(_FORMS) :]))


_FORMS = (len(SHAPES), len(SHAPES), len(SCALES), len(SCALES))


def _scaled(shape: str, scale: str | None, of: str) -> str:
    return shape if scale is None else f"ratio({shape}, {scale.format(of)})"


@STRATEGIES.register(reference=OPTISHEAR, named=False, metrics=True, leaves=("W", "X"))
def optishear(problem: Problem, population: int = 24) -> Search:
    """OptiShear: a metric's form and one of three ratios per block, bred by NSGA-III under two objectives.

    They are the loss, and how far the blocks' ratios are from the target in the mean, as in the published code. Every
    candidate is brought to the exact budget before it is judged, as all are here, and the loss is ours.

    Liu et al., 2025, https://arxiv.org/abs/2502.10735; Deb & Jain, 2014, NSGA-III.
    """
    resolver, rng = problem.resolver, problem.rng
    target, sizes = resolver.config.sparsity, _block_sizes(resolver)
    found: dict[Individual, Ranked] = {}
    best: list[Ranked] = yield from race(problem, [UNIFORM], keep=1.0)
    alive: list[Individual] = []
    fresh = [Individual.drawn(len(sizes), rng) for _ in range(population)]
    while fresh:
        asked = {one: _candidate(one, resolver) for one in dict.fromkeys(fresh)}
        ranking = yield from race(problem, asked.values())
        by_candidate = {ranked.candidate: ranked for ranked in ranking}
        found |= {one: by_candidate[candidate] for one, candidate in asked.items() if candidate in by_candidate}
        best = merge(best, ranking)[:12]
        if problem.over:
            break
        everyone = [one for one in dict.fromkeys([*alive, *fresh]) if one in found]
        costs = [(found[one].loss, _off(one.shares(target), sizes, target)) for one in everyone]
        alive = [everyone[place] for place in survivors(costs, population, rng)] or fresh
        fresh = [rng.choice(alive).child(rng.choice(alive), rng) for _ in range(population)]
    return [ranked.candidate for ranked in best]


def _candidate(one: Individual, resolver: Resolver) -> Candidate:
    shares = one.shares(resolver.config.sparsity)
    blocks = zip(resolver.units["block"].values(), shares)
    proposed = {weight.name: share for weights, share in blocks for weight in weights}
    return Candidate("optishear", counts=resolver.fit(proposed), metric=one.metric)


def _block_sizes(resolver: Resolver) -> list[int]:
    return [sum(weight.size for weight in weights) for weights in resolver.units["block"].values()]


def _off(shares: Sequence[float], sizes: Sequence[int], target: float) -> float:
    """How far the mean of shares, weighted by sizes, is from the target."""
    return abs(sum(share * size for share, size in zip(shares, sizes)) / sum(sizes) - target)


def survivors(costs: Sequence[tuple[float, float]], number: int, rng: random.Random) -> list[int]:
    """Places of the `number` that NSGA-III keeps of these: fronts first, and of the last one who fill empty niches.

    A niche is what lies nearest to one of the reference points between both objectives, each scaled to [0, 1].
    """
    kept: list[int] = []
    last: list[int] = []
    for front in fronts(costs):
        if len(kept) + len(front) > number:
            last = front
            break
        kept += front
    if not last:
        return kept
    niches = _niches(costs, [*kept, *last])
    crowd = [0] * (DIVISIONS + 1)
    for place in kept:
        crowd[niches[place][0]] += 1
    while len(kept) < number:
        # The least crowded niche that somebody is left for; of several, one at random.
        least = min(crowd[niches[place][0]] for place in last)
        niche = rng.choice(sorted({niches[p][0] for p in last if crowd[niches[p][0]] == least}))
        there = [place for place in last if niches[place][0] == niche]
        chosen = min(there, key=lambda place: niches[place][1]) if least == 0 else rng.choice(there)
        crowd[niche] += 1
        kept.append(chosen)
        last.remove(chosen)
    return kept


def fronts(costs: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Places in fronts: in each, nobody is beaten in one objective and not bettered in the other by one of them."""
    left, found = [*range(len(costs))], []
    while left:
        front = [p for p in left if not any(_dominates(costs[q], costs[p]) for q in left)]
        found.append(front)
        left = [place for place in left if place not in front]
    return found


def _dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _niches(costs: Sequence[tuple[float, float]], places: Sequence[int]) -> dict[int, tuple[int, float]]:
    """Place -> its nearest reference line and how far from it, after both objectives are scaled to [0, 1]."""
    columns = [[costs[place][axis] for place in places] for axis in (0, 1)]
    lows, spans = [min(column) for column in columns], [max(column) - min(column) or 1.0 for column in columns]
    lines = [(i / DIVISIONS, 1 - i / DIVISIONS) for i in range(DIVISIONS + 1)]
    found = {}
    for place in places:
        x, y = ((costs[place][axis] - lows[axis]) / spans[axis] for axis in (0, 1))
        # The distance of a point from the line through the origin and a reference point.
        gaps = [abs(x * b - y * a) / (a * a + b * b) ** 0.5 for a, b in lines]
        found[place] = min(enumerate(gaps), key=lambda pair: pair[1])
    return found
