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
from .metric_space import MetricSpace
from .resolver import Resolver
from .space import Candidate, SearchSpace
from .trace import NO_ROOM, Request, Trial


Search = Generator[list[Request], list[Trial], list[Candidate]]
# What a strategy says of itself: `named=False`, that it tries no named allocator: then none is measured; `moves=True`,
# that it moves the anchor: then room is kept for its finalists to meet the proxy; `curves=OFFSETS`, that it reads
# error curves: then matrices are solved so far beside the anchor, and there is no proxy; `metrics=True`, that it looks
# for a metric as well, `leaves=(...)`, that this is of these alone, and `fixed=True`, that it looks for nothing else:
# then the config's allocation is where it does.
STRATEGIES = Registry("search strategy")

UNIFORM = Candidate()

LARGEST_BUDGET = 1e12
GENERATION = 16  # candidates that are compared at once
IDLE = 200  # trials in a row that found nothing new, after which a strategy only repeats itself


@dataclass(frozen=True)
class Room:
    """What is left of a budget: `None` is no limit."""

    tokens: int | None = None
    evaluations: int | None = None
    seconds: float | None = None

    def holds(self, tokens: int, evaluations: int) -> bool:
        """Whether so much fits; seconds are known afterwards only."""
        return (self.tokens is None or tokens <= self.tokens) and (
            self.evaluations is None or evaluations <= self.evaluations
        )


@dataclass
class Budget:
    """How much a search may cost, and what it has cost: `None` is no limit.

    Attributes:
        idle: trials in a row that cost nothing.
        refused: whether a trial was refused since there was no room for it.
        strategy_tokens: what was spent when the finalists were chosen; `None` before.
    """

    tokens: int | None = None
    evaluations: int | None = None
    seconds: float | None = None
    spent_tokens: int = 0
    spent_evaluations: int = 0
    spent_seconds: float = 0.0
    idle: int = 0
    refused: bool = False
    strategy_tokens: int | None = None

    def add(self, trial: Trial) -> None:
        self.idle = 0 if trial.tokens else self.idle + 1
        self.refused = self.refused or trial.error == NO_ROOM
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

    def room(self, share: float = 1.0) -> Room:
        """What is left until `share` of the budget is spent."""
        return Room(
            # `and` passes None on: no limit stays none.
            self.tokens and max(math.floor(share * self.tokens + 1e-6) - self.spent_tokens, 0),
            self.evaluations and max(math.floor(share * self.evaluations + 1e-6) - self.spent_evaluations, 0),
            self.seconds and max(share * self.seconds - self.spent_seconds, 0.0),
        )

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:g} s"
        if self.evaluations is not None:
            return f"{self.evaluations:,} evaluations"
        return "no limit" if self.tokens is None else f"{self.tokens:,} tokens"


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

    Attributes:
        windows, length: of the validation text.
        named: allocators that may be tried by their name.
        until: the share of the budget at which the strategy, or its stage, ends.
        start: a candidate to begin from.
        rungs: how many windows candidates of a race have met after each of its rungs.
        metrics: what may be tried by a strategy that looks for a metric.
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
    metrics: MetricSpace = field(default_factory=MetricSpace)

    def __post_init__(self):
        self.budget.idle = 0  # a stage of its own
        if not self.rungs:
            self.rungs = self._rungs()

    def _rungs(self) -> tuple[int, ...]:
        """2k and 8k tokens, within what there is; less where a small budget has to do for a whole generation."""
        first, last = (max(tokens // self.length, 1) for tokens in (2048, 8192))
        if self.budget.tokens is not None:
            crowd = max(GENERATION, 1 + len(self.named))
            first = min(first, max(self.budget.tokens // (4 * crowd * self.length), 1))
            last = min(last, 4 * first)
        return tuple(sorted({min(count, self.windows) for count in (first, last)}))

    @property
    def over(self) -> bool:
        """Whether the budget is spent, or nothing new has been asked for so long that nothing new will be."""
        return self.budget.share >= self.until or self.budget.refused or self.budget.idle >= IDLE

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

    def meet(self, trial: Trial) -> None:
        """Take in a trial on the windows behind those that it has met."""
        seen, stop = trial.request.start, trial.request.stop
        self.loss = trial.loss if not seen else (self.loss * seen + trial.loss * (stop - seen)) / stop
        self.windows, self.counts = stop, trial.counts


def race(problem: Problem, candidates: Iterable[Candidate], keep: float = 0.34) -> Generator:
    """Candidates meet growing numbers of common windows; after each rung the best share goes on, if budget is left.

    Returns the ranking, best first: those that met more windows come before those that dropped out. Whom the budget
    has no room for at a rung meets what fits of it, or stays where he was; at the first he is not ranked.
    """
    running = [Ranked(candidate, None) for candidate in candidates]
    out: list[Ranked] = []
    for number, stop in enumerate(problem.rungs):
        if number and problem.over:
            break  # what was met is a ranking, if a coarse one
        start = 0 if number == 0 else problem.rungs[number - 1]
        trials = yield [Request("loss", ranked.candidate, start, stop) for ranked in running]
        survivors, stayed = [], []
        for ranked, trial in zip(running, trials):
            if trial.loss is None:
                stayed += [ranked] if trial.error == NO_ROOM and ranked.windows else []
                continue
            ranked.meet(trial)
            survivors.append(ranked)
        if stayed:
            yield from _meet_what_fits(problem, stayed[: 1 if survivors else 2], start, stop)
            stayed.sort(key=lambda ranked: (-ranked.windows, ranked.loss))
        # Stable: of equals the one that was named first stays first, on every rank and in every replay.
        survivors.sort(key=lambda ranked: ranked.loss)
        last = stop == problem.rungs[-1]
        # Two at least: a race of one is none.
        number_kept = len(survivors) if last else max(math.ceil(keep * len(survivors)), min(2, len(survivors)))
        running, dropped = survivors[:number_kept], survivors[number_kept:]
        out = dropped + stayed + out
    return running + out


def _meet_what_fits(problem: Problem, refused: Sequence[Ranked], start: int, stop: int) -> Generator:
    """Let those whom a rung was too large for meet as many of its windows as are left for each."""
    room = problem.budget.room(problem.until).tokens
    windows = 0 if room is None else min(room // (len(refused) * problem.length), stop - start - 1)
    if windows > 0:
        trials = yield [Request("loss", ranked.candidate, start, start + windows) for ranked in refused]
        for ranked, trial in zip(refused, trials):
            if trial.loss is not None:
                ranked.meet(trial)


def pass_windows(problem: Problem, usual: int) -> int:
    """Validation windows of the next backward pass: about `usual`, so that passes use up the budget; 0 at its end.

    That is where there would be less than a quarter of `usual`: a step on so little text is mostly noise.
    """
    usual = min(usual, problem.windows)
    room = problem.budget.room(problem.until).tokens
    if room is None:
        return usual
    fit = room // (3 * problem.length)  # forward and backward
    # Where there are no more windows for fewer passes, another one, unless it is for a tenth.
    passes = max(round(fit / usual), math.ceil(0.9 * fit / problem.windows), 1)
    windows = min(fit // passes, problem.windows)
    return windows if 4 * windows >= usual else 0


def best_of(ranking: Sequence[Ranked]) -> Candidate:
    """The first of a ranking; uniform where the budget had no room for anyone."""
    return ranking[0].candidate if ranking else UNIFORM


def distinct(ranking: Iterable[Ranked]) -> list[Ranked]:
    """The ranking without candidates that give an allocation once more."""
    kept: dict[tuple, Ranked] = {}
    for ranked in ranking:
        kept.setdefault((ranked.counts, ranked.candidate.metric), ranked)
    return [*kept.values()]


def merge(*rankings: Sequence[Ranked]) -> list[Ranked]:
    found = [ranked for ranking in rankings for ranked in ranking]
    # More windows first: a low loss on few windows is mostly luck.
    return distinct(sorted(found, key=lambda ranked: (-ranked.windows, ranked.loss)))
