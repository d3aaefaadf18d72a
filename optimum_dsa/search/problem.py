"""What a search strategy works with: its problem, its budget, and races.

A strategy is a generator: what it yields is asked (a list of `Request`s), what it is sent is told (the answering
`Trial`s), and what it returns are its finalists, best first. It draws randomness from one seeded source and reads
nothing but trials, so that replaying the trials of a trace brings it back to where it was.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..common.registry import Registry
from .resolver import Resolver
from .space import Candidate, SearchSpace
from .trace import Request, Trial


Search = Generator[list[Request], list[Trial], list[Candidate]]
# A strategy that never tries a named allocator says so with the fact `named=False`: then none is measured.
STRATEGIES = Registry("search strategy")

UNIFORM = Candidate()

LARGEST_BUDGET = 1e12
IDLE = 200  # trials in a row that found nothing new, after which a strategy only repeats itself


@dataclass
class Budget:
    """How much a search may cost, and what it has cost: `None` is no limit."""

    tokens: int | None = None
    evaluations: int | None = None
    seconds: float | None = None
    spent_tokens: int = 0
    spent_evaluations: int = 0
    spent_seconds: float = 0.0
    idle: int = 0

    def add(self, trial: Trial) -> None:
        self.idle = 0 if trial.tokens else self.idle + 1
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


def parse_budget(text: str | int | Budget) -> Budget:
    """A budget from "2M tokens" (or 2M, or a number), "500 evaluations", "10 min", "90 s".

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(text, Budget):
        return text
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kM]?)\s*(tokens|evaluations|s|min|h|)\s*", str(text))
    amount = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]] if found else 0.0
    seconds = {"s": 1, "min": 60, "h": 3600}.get(found[3]) if found else None
    if not 0 < amount <= LARGEST_BUDGET or (seconds is None and amount < 1):  # no whole token would be no limit
        raise ValueError(
            f"Cannot read the budget {text!r}: expected '2M tokens', '500 evaluations', '10 min' or '90 s'."
        )
    if seconds is not None:
        return Budget(seconds=amount * seconds)
    return Budget(evaluations=int(amount)) if found[3] == "evaluations" else Budget(tokens=int(amount))


@dataclass
class Problem:
    """What a strategy knows: the space, the sizes, the windows, its part of the budget and its randomness.

    What it writes into `notes` is told to the user at the end.
    """

    space: SearchSpace
    resolver: Resolver
    windows: int
    length: int
    budget: Budget
    named: tuple[str, ...]
    rng: random.Random
    until: float = 1.0
    start: Candidate | None = None
    rungs: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.budget.idle = 0  # a stage of its own
        if not self.rungs:
            # 2k and 8k tokens, within what there is
            windows = [max(tokens // self.length, 1) for tokens in (2048, 8192)]
            self.rungs = tuple(sorted({min(count, self.windows) for count in windows}))

    @property
    def over(self) -> bool:
        """Whether the budget is spent, or nothing new has been asked for so long that nothing new will be."""
        return self.budget.share >= self.until or self.budget.idle >= IDLE

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
    """Candidates meet growing numbers of common windows; after each rung the best share goes on, if budget is left.

    Returns the ranking, best first: those that met more windows come before those that dropped out.
    """
    running = [Ranked(candidate, None) for candidate in candidates]
    out: list[Ranked] = []
    for number, stop in enumerate(problem.rungs):
        if number and problem.over:
            break  # what was met is a ranking, if a coarse one
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


def merge(*rankings: Sequence[Ranked]) -> list[Ranked]:
    found = [ranked for ranking in rankings for ranked in ranking]
    return distinct(sorted(found, key=lambda ranked: (-ranked.windows, ranked.loss)))
