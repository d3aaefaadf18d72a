"""The last round: finalists are pruned for real, and ranked by what that leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ..common.ranks import current_ranks
from .problem import UNIFORM, Budget, Problem, Room
from .resolver import Resolver
from .result import Finalist
from .space import Candidate
from .trace import NO_ROOM, Request, Trial


# (requests, *what tells how much may be spent on them*) -> trials
Serve = Callable[..., list[Trial]]


@dataclass(frozen=True)
class FinalRound:
    """How finalists are ranked.

    Attributes:
        finalists: how many, uniform besides.
        windows: validation windows that each meets after the prune.
        proxy_windows: and before it, with one-shot masks, if there is room; 0 where nothing raced by a proxy.
        met: whether finalists have met those already, so that no room has to be kept for them.
    """

    finalists: int
    windows: int
    proxy_windows: int
    met: bool = False

    @property
    def _looks(self) -> int:
        """Evaluations that each finalist takes."""
        return 1 if self.met or not self.proxy_windows else 2

    def tokens(self, length: int) -> int:
        """What it costs with windows of `length` tokens."""
        return (self.finalists + 1) * (self.windows + (self._looks - 1) * self.proxy_windows) * length

    @property
    def evaluations(self) -> int:
        return self._looks * (self.finalists + 1)

    def reserved(self, budget: Budget, length: int) -> float:
        """The share of the budget that is kept for it: what it costs, half of all at most, a tenth of a time.

        Where that is more than a fifth, room is kept for the prunes alone: a proxy decides nothing at the end.
        """
        if not (limit := budget.tokens or budget.evaluations):
            return 0.1
        share, pruned = (
            (each.tokens(length) if budget.tokens else each.evaluations) / limit for each in (self, self._pruned)
        )
        # Half at most: without a search there is nothing to rank.
        return share if share <= 0.2 else min(pruned, 0.5)

    @property
    def _pruned(self) -> FinalRound:
        """The prunes of this round, without proxies."""
        return replace(self, proxy_windows=0)

    def within(self, budget: Budget, length: int) -> FinalRound:
        """The round whose prunes what is left of the budget has room for: fewer windows each, then fewer finalists.

        Of the smallest round, one finalist and uniform on a window each, there is nothing to leave out. Proxies get
        what the prunes leave over.
        """
        room, finalists, windows = budget.room(), self.finalists, self.windows
        if room.evaluations is not None:
            finalists = min(finalists, max(room.evaluations - 1, min(finalists, 1)))
        if room.tokens is not None:
            windows = room.tokens // length  # that all of them can meet after the prune
            # Two windows for each, rather than many finalists on one.
            finalists = min(finalists, max(windows // 2 - 1, min(finalists, 1)))
            windows = min(max(windows // (finalists + 1), 1), self.windows)
        return replace(self, finalists=finalists, windows=windows)

    def besides(self, budget: Budget, length: int) -> Room:
        """What is left of the budget beside the prunes of this round."""
        room, pruned = budget.room(), self._pruned
        return Room(
            None if room.tokens is None else max(room.tokens - pruned.tokens(length), 0),
            None if room.evaluations is None else max(room.evaluations - pruned.evaluations, 0),
        )

    def note(self, whole: FinalRound) -> str | None:
        """What is less than in `whole`, for the user."""
        less = []
        if self.finalists < whole.finalists:
            less.append(f"{self.finalists} of {whole.finalists} finalists besides uniform")
        if self.windows < whole.windows:
            less.append(f"{self.windows} of {whole.windows} validation windows after the prune")
        return f"the budget had room for {' and '.join(less)}" if less else None


def rank(serve: Serve, problem: Problem, ranking: Sequence[Candidate], whole: FinalRound) -> tuple[Finalist, ...]:
    """The finalists by their loss after the prune, best first; beside it that of one-shot masks."""
    resolver, budget = problem.resolver, problem.budget
    budget.strategy_tokens = budget.spent_tokens
    chosen = choose(ranking, resolver, whole.finalists)
    whole = replace(whole, finalists=len(chosen) - 1)
    final = whole.within(budget, problem.length)
    if final.finalists < whole.finalists:
        chosen = choose(ranking, resolver, final.finalists)
    if (note := final.note(whole)) is not None:
        problem.notes.append(note)
    proxies = _proxies(serve, chosen, problem, final)
    trials = _pruned(serve, chosen, final.windows, budget)
    if len(trials) < len(chosen):
        problem.notes.append(f"the budget had room for {len(trials)} of {len(chosen)} finalists, uniform included")
    table = []
    for candidate, proxy in zip(chosen, proxies):
        if (trial := trials.get(candidate)) is not None and trial.loss is not None:
            asked = resolver.allocation(resolver.counts(candidate), str(candidate))
            asked = asked if candidate.metric is None else replace(asked, metric=candidate.metric)
            removed = resolver.allocation(trial.counts, str(candidate))
            table.append(Finalist(candidate, trial.loss, trial.perplexity, proxy, asked, removed))
    return tuple(sorted(table, key=lambda row: row.loss))


def choose(ranking: Sequence[Candidate], resolver: Resolver, number: int) -> list[Candidate]:
    """The first distinct allocations of the ranking, and uniform: each by a name rather than by counts."""
    chosen: dict[tuple, Candidate] = {}
    for candidate in ranking:
        with suppress(ValueError):  # an impossible one
            key = resolver.removed(candidate), candidate.metric
            if key in chosen:
                chosen[key] = _named(chosen[key], candidate)
            elif len(chosen) < number:
                chosen[key] = candidate
    chosen[resolver.removed(UNIFORM), None] = UNIFORM
    return list(chosen.values())


def _named(first: Candidate, second: Candidate) -> Candidate:
    return second if first.counts is not None and second.counts is None else first


def _pruned(serve: Serve, chosen: Sequence[Candidate], windows: int, budget: Budget) -> dict[Candidate, Trial]:
    """Finalist -> its trial after the prune.

    A budget of time is looked at in between: the best and uniform are pruned in any case, others while it lasts.
    """
    first = dict.fromkeys([chosen[0], UNIFORM])
    queue = [*first, *(candidate for candidate in chosen if candidate not in first)]
    each = len(queue) if budget.seconds is None else current_ranks().count
    together = max(each, len(first))
    trials: dict[Candidate, Trial] = {}
    while queue and not (trials and budget.room().seconds == 0):
        part, queue = queue[:together], queue[together:]
        trials |= zip(part, serve([Request("sequential", candidate, 0, windows) for candidate in part]))
        together = each
    return trials


def _proxies(serve: Serve, chosen: Sequence[Candidate], problem: Problem, final: FinalRound) -> list[float | None]:
    """The proxy loss of each on the first windows, rung by rung: who raced from the dense anchor has met them.

    All are judged on the same windows: those of the last rung that the budget has room for beside the prunes.
    """
    means: list[float | None] = [None] * len(chosen)
    if not final.proxy_windows:
        return means
    # A strategy may have moved the anchor; proxies are comparable from one only.
    serve([Request("anchor", Candidate("dense", counts=(0,) * len(problem.resolver.sizes)))])
    stops = [stop for stop in problem.rungs if stop < final.proxy_windows] + [final.proxy_windows]
    totals: list[float | None] = [0.0] * len(chosen)
    for start, stop in zip([0, *stops], stops):
        requests = [Request("loss", candidate, start, stop) for candidate in chosen]
        trials = serve(requests, lambda: final.besides(problem.budget, problem.length))
        if start and any(trial.error == NO_ROOM for trial in trials):
            break
        for place, trial in enumerate(trials):
            known = totals[place] is not None and trial.loss is not None
            totals[place] = totals[place] + trial.loss * (stop - start) if known else None
        means = [None if total is None else total / stop for total in totals]
    return means
