"""The last round: finalists are pruned for real, and ranked by what that leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ..common.devices import process_state
from .problem import UNIFORM, Budget, Problem
from .resolver import Resolver
from .result import Finalist
from .space import Candidate
from .trace import Request, Trial


Serve = Callable[[Sequence[Request]], list[Trial]]


@dataclass(frozen=True)
class FinalRound:
    """How finalists are ranked.

    Attributes:
        finalists: how many, uniform besides.
        windows: validation windows that each meets after the prune.
        proxy_windows: and before it, with one-shot masks.
    """

    finalists: int
    windows: int
    proxy_windows: int

    def tokens(self, length: int) -> int:
        """What it costs with windows of `length` tokens."""
        return (self.finalists + 1) * (self.windows + self.proxy_windows) * length

    @property
    def evaluations(self) -> int:
        return 2 * (self.finalists + 1)

    def reserved(self, budget: Budget, length: int) -> float:
        """The share of the budget that is kept for it: what it costs, half of all at most, a tenth of a time."""
        if budget.tokens:
            # Half at most: without a search there is nothing to rank.
            return min(self.tokens(length) / budget.tokens, 0.5)
        return min(self.evaluations / budget.evaluations, 0.5) if budget.evaluations else 0.1

    def within(self, budget: Budget, length: int) -> FinalRound:
        """The round that what is left of the budget has room for: fewer windows each, then fewer finalists.

        Of the smallest round, one finalist and uniform on a window each, there is nothing to leave out.
        """
        room, finalists = budget.room(), self.finalists
        if room.evaluations is not None:
            finalists = min(finalists, max(room.evaluations // 2 - 1, min(finalists, 1)))
        if room.tokens is None:
            return FinalRound(finalists, self.windows, self.proxy_windows)
        windows = room.tokens // length  # that all of them can meet, before and after the prune
        finalists = min(finalists, max(windows // 2 - 1, min(finalists, 1)))
        each = max(windows // (finalists + 1), 2)
        whole = self.windows + self.proxy_windows
        if each >= whole:
            return FinalRound(finalists, self.windows, self.proxy_windows)
        proxy = max(each * self.proxy_windows // whole, 1)
        return FinalRound(finalists, min(each - proxy, self.windows), proxy)

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
    # A strategy may have moved the anchor; proxies are comparable from one only.
    serve([Request("anchor", Candidate("dense", counts=(0,) * len(resolver.sizes)))])
    proxies = _proxies(serve, chosen, problem.rungs, final.proxy_windows)
    trials = _pruned(serve, chosen, final.windows, budget)
    if len(trials) < len(chosen):
        problem.notes.append(f"the budget had room for {len(trials)} of {len(chosen)} finalists, uniform included")
    table = []
    for candidate, proxy in zip(chosen, proxies):
        if (trial := trials.get(candidate)) is not None and trial.loss is not None:
            asked = resolver.allocation(resolver.counts(candidate), str(candidate))
            removed = resolver.allocation(trial.counts, str(candidate))
            table.append(Finalist(candidate, trial.loss, trial.perplexity, proxy, asked, removed))
    return tuple(sorted(table, key=lambda row: row.loss))


def choose(ranking: Sequence[Candidate], resolver: Resolver, number: int) -> list[Candidate]:
    """The first distinct allocations of the ranking, and uniform: each by a name rather than by counts."""
    chosen: dict[tuple[int, ...], Candidate] = {}
    for candidate in ranking:
        with suppress(ValueError):  # an impossible one
            removed = resolver.removed(candidate)
            if removed in chosen:
                chosen[removed] = _named(chosen[removed], candidate)
            elif len(chosen) < number:
                chosen[removed] = candidate
    uniform = resolver.removed(UNIFORM)
    chosen[uniform] = UNIFORM
    return list(chosen.values())


def _named(first: Candidate, second: Candidate) -> Candidate:
    return second if first.counts is not None and second.counts is None else first


def _pruned(serve: Serve, chosen: Sequence[Candidate], windows: int, budget: Budget) -> dict[Candidate, Trial]:
    """Finalist -> its trial after the prune.

    A budget of time is looked at in between: the best and uniform are pruned in any case, others while it lasts.
    """
    first = dict.fromkeys([chosen[0], UNIFORM])
    queue = [*first, *(candidate for candidate in chosen if candidate not in first)]
    each = len(queue) if budget.seconds is None else process_state().num_processes
    together = max(each, len(first))
    trials: dict[Candidate, Trial] = {}
    while queue and not (trials and budget.room().seconds == 0):
        part, queue = queue[:together], queue[together:]
        trials |= zip(part, serve([Request("sequential", candidate, 0, windows) for candidate in part]))
        together = each
    return trials


def _proxies(serve: Serve, chosen: Sequence[Candidate], rungs: Sequence[int], windows: int) -> list[float | None]:
    """The proxy loss of each on the first windows, rung by rung: who raced from the dense anchor has met them."""
    stops = [stop for stop in rungs if stop < windows] + [windows]
    totals: list[float | None] = [0.0] * len(chosen)
    for start, stop in zip([0, *stops], stops):
        for place, trial in enumerate(serve([Request("loss", candidate, start, stop) for candidate in chosen])):
            known = totals[place] is not None and trial.loss is not None
            totals[place] = totals[place] + trial.loss * (stop - start) if known else None
    return [None if total is None else total / windows for total in totals]
