"""Running a search: requests are answered, trials are written down, the finalists are pruned for real."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.utils import tqdm
from torch import Tensor, cuda, nn

from ..allocation import ALLOCATIONS
from ..configuration import DSAConfig
from ..data import Calibration
from .objective import Objective
from .resolve import Resolver
from .result import Finalist, SearchResult
from .space import Candidate, SearchSpace
from .strategies import STRATEGIES, UNIFORM, Budget, Problem
from .trace import Request, SearchTrace, Trial


def parse_budget(text: str | int | Budget) -> Budget:
    """A budget from "2M tokens" (or 2M, or a number), "500 evaluations", "10 min", "90 s".

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(text, Budget):
        return text
    found = re.fullmatch(r"\s*([\d.]+)\s*([kM]?)\s*(tokens|evaluations|s|min|h|)\s*", str(text))
    if not found or float(found[1]) <= 0:
        raise ValueError(
            f"Cannot read the budget {text!r}: expected '2M tokens', '500 evaluations', '10 min' or '90 s'."
        )
    amount = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]]
    if found[3] == "evaluations":
        return Budget(evaluations=int(amount))
    if found[3] in ("s", "min", "h"):
        return Budget(seconds=amount * {"s": 1, "min": 60, "h": 3600}[found[3]])
    return Budget(tokens=int(amount))


class Evaluator:
    """Answers requests, each allocation once; over the ranks of a distributed run where there are some."""

    def __init__(self, objective: Objective, resolver: Resolver):
        self.objective, self.resolver = objective, resolver
        self.ranks = PartialState(cpu=not cuda.is_available())
        self.known: dict[tuple, Any] = {}
        self.anchor: tuple[int, ...] | None = None
        self.length = objective.validation.shape[1]

    def replay(self, trial: Trial) -> None:
        """Learn what a trial of an earlier run found out, without computing anything."""
        if trial.request.kind == "anchor":
            self._move(trial.counts)
        elif trial.error is None:
            self.known[self._key(*_job(trial.request, trial.counts))] = (trial.loss, trial.slopes)

    def answer(self, requests: Sequence[Request], first: int) -> list[Trial]:
        """The trials of `requests`, numbered from `first`; the same on every rank."""
        prepared: list[tuple[Request, tuple[int, ...] | None, str | None]] = []
        for request in requests:
            try:
                prepared.append((request, self.resolver.counts(request.candidate), None))
            except ValueError as error:
                prepared.append((request, None, str(error)))
        for request, counts, _ in prepared:
            if request.kind == "anchor":
                self._move(counts)
        fresh = list(
            dict.fromkeys(
                _job(request, counts)
                for request, counts, error in prepared
                if error is None and request.kind != "anchor" and self._key(*_job(request, counts)) not in self.known
            )
        )
        costs = dict(zip(fresh, self._compute(fresh)))
        for job in fresh:
            self.known[self._key(*job)] = costs[job][:2]
        trials = []
        for number, (request, counts, error) in enumerate(prepared, first):
            if error is not None or request.kind == "anchor":
                trials.append(Trial(number, request, counts=counts, error=error))
                continue
            loss, slopes = self.known[self._key(*_job(request, counts))]
            spent = costs.pop(_job(request, counts), None)  # a repetition costs nothing
            tokens = 0 if spent is None else len(request.rows) * self.length * (3 if request.kind == "slopes" else 1)
            error = None if loss == loss else "the loss is not a number"
            loss = loss if error is None else None
            seconds = 0.0 if spent is None else spent[2]
            trials.append(Trial(number, request, loss, slopes, tokens, seconds, counts, error))
        return trials

    def _compute(self, jobs: Sequence[tuple]) -> list[tuple]:
        """(loss, slopes, seconds) of each job, in order, spread over the ranks."""
        if self.ranks.num_processes == 1:
            return [self._one(*job) for job in jobs]
        alike = [job for job in jobs if job[0] == "loss"]
        with self.ranks.split_between_processes(list(range(len(alike)))) as mine:
            done = dict(zip(alike, gather_object([self._one(*alike[index]) for index in mine])))
        for job in jobs:
            if job[0] != "loss":  # every rank walks the blocks, one tells the number
                done[job] = broadcast_object_list([self._one(*job)])[0]
        return [done[job] for job in jobs]

    def _one(self, kind: str, counts: tuple[int, ...], start: int, stop: int) -> tuple:
        began = time.perf_counter()
        by_name, rows = dict(zip(self.resolver.sizes, counts)), range(start, stop)
        slopes = None
        if kind == "slopes":
            loss, found = self.objective.slopes(by_name, rows)
            slopes = tuple(found[name] for name in self.resolver.sizes)
        elif kind == "sequential":
            loss = self.objective.sequential(by_name, rows)
            self._move(self.anchor)
        else:
            loss = self.objective.loss(by_name, rows)
        return loss, slopes, time.perf_counter() - began

    def _move(self, counts: tuple[int, ...] | None) -> None:
        self.anchor = counts
        self.objective.move_anchor(None if counts is None else dict(zip(self.resolver.sizes, counts)))

    def _key(self, kind: str, counts: tuple[int, ...], start: int, stop: int) -> tuple:
        """What an answer depends on: a sequential one not on the anchor."""
        return (None if kind == "sequential" else self.anchor, kind, counts, start, stop)


def _job(request: Request, counts: tuple[int, ...] | None) -> tuple:
    return (request.kind, counts, request.start, request.stop)


def search(
    model: nn.Module,
    calibration: Calibration,
    validation: Tensor,
    config: DSAConfig,
    *,
    strategy: str = "auto",
    budget: str | int | Budget = "2M tokens",
    space: SearchSpace | None = None,
    finalists: int = 4,
    folder: str | Path | None = None,
    resume: bool = False,
    named: Sequence[str] | None = None,
) -> SearchResult:
    """The allocation that hurts `model` least at `config.sparsity`, found on validation text.

    Args:
        calibration: feeds statistics.
        validation: LongTensor (windows, length), disjoint from calibration and from any text that a result is reported
            on.
        config: sparsity, method, bounds, seed; its allocation is not looked at.
        strategy: a row of `STRATEGIES`.
        budget: validation tokens (a backward pass counts double), evaluations, or seconds; see `parse_budget`.
        finalists: candidates that are ranked once more under the real, sequential prune, uniform besides. The budget
            has room left for them.
        folder: where the trace goes, as it grows; and at the end the result.
        resume: go on with the trace in `folder`; the end is that of an uninterrupted run.
        named: rows of `ALLOCATIONS` that are tried; all by default.
    """
    budget = parse_budget(budget)
    run = STRATEGIES[strategy]
    settings = {
        "strategy": strategy,
        "budget": [budget.tokens, budget.evaluations, budget.seconds],
        "finalists": finalists,
        "config": {k: v for k, v in config.to_dict().items() if k not in ("allocation", "spread", "batch_size")},
        "calibration": calibration.facts() if calibration else None,
        "validation": list(validation.shape),
    }
    named = tuple(name for name in (ALLOCATIONS if named is None else named) if name != "uniform")
    main = PartialState(cpu=not cuda.is_available()).is_main_process
    path = Path(folder) / "trace.jsonl" if folder is not None else None
    trace = SearchTrace.open(path if main else None, settings, resume)
    try:
        objective = Objective(model, calibration, validation, config)
        resolver = Resolver(model, objective.architecture, calibration, config, named)
        evaluator = Evaluator(objective, resolver)
        replayed = broadcast_object_list([trace.trials])[0] if evaluator.ranks.num_processes > 1 else trace.trials
        windows = len(validation)
        whole = windows * validation.shape[1]
        reserve = min((finalists + 1) * whole / budget.tokens, 0.5) if budget.tokens else 0.1
        if space is None:
            kinds = tuple(dict.fromkeys(resolver.kinds.values()))
            space = SearchSpace(kinds=kinds) if len(kinds) <= 16 else SearchSpace()
        problem = Problem(
            space, resolver, windows, validation.shape[1], budget, named, random.Random(config.seed), 1 - reserve
        )
        conductor = _Conductor(evaluator, trace, budget, list(replayed))
        ranking = conductor.conduct(run(problem))
        chosen = _finalists(ranking, resolver, finalists)
        trials = conductor.serve([Request("sequential", candidate, 0, windows) for candidate in chosen])
        table = tuple(
            Finalist(candidate, trial.loss, resolver.allocation(trial.counts, str(candidate)))
            for candidate, trial in zip(chosen, trials)
            if trial.loss is not None
        )
        result = SearchResult(config, tuple(sorted(table, key=lambda row: row.loss)), trace, budget)
        if folder is not None and main:
            result.save(folder)
        return result
    finally:
        trace.close()


def _finalists(ranking: Sequence[Candidate], resolver: Resolver, number: int) -> list[Candidate]:
    """The first distinct allocations of the ranking, and uniform."""
    chosen: dict[tuple[int, ...], Candidate] = {}
    for candidate in ranking:
        if len(chosen) < number:
            with suppress(ValueError):  # an impossible one
                chosen.setdefault(resolver.counts(candidate), candidate)
    chosen.setdefault(resolver.counts(UNIFORM), UNIFORM)
    return list(chosen.values())


class _Conductor:
    """Passes requests from a strategy to the evaluator and trials back; trials of an earlier run come first."""

    def __init__(self, evaluator: Evaluator, trace: SearchTrace, budget: Budget, earlier: list[Trial]):
        self.evaluator, self.trace, self.budget = evaluator, trace, budget
        self.earlier = earlier
        self.number = 0
        self.best: float | None = None
        self.bar = tqdm(total=100, desc="Searching", unit="%", name="optimum_dsa.search", leave=False)

    def conduct(self, strategy) -> list[Candidate]:
        """Run a strategy to its end."""
        try:
            requests = next(strategy)
            while True:
                requests = strategy.send(self.serve(requests))
        except StopIteration as end:
            return end.value
        finally:
            self.bar.close()

    def serve(self, requests: Sequence[Request]) -> list[Trial]:
        trials = []
        while self.number < len(self.earlier) and len(trials) < len(requests):
            trial = self.earlier[self.number]
            if trial.request != requests[len(trials)]:
                raise ValueError(
                    f"Trial {self.number} of the trace is {trial.request.candidate}, but this search asks for "
                    f"{requests[len(trials)].candidate}: was it made by another version or on another model?"
                )
            self.evaluator.replay(trial)
            self._note(trial)
            trials.append(trial)
        if len(trials) < len(requests):
            for trial in self.evaluator.answer(requests[len(trials) :], self.number):
                self.trace.append(trial)
                self._note(trial)
                trials.append(trial)
        return trials

    def _note(self, trial: Trial) -> None:
        self.number += 1
        self.budget.add(trial)
        if trial.loss is not None and trial.request.kind == "loss":
            self.best = trial.loss if self.best is None else min(self.best, trial.loss)
        self.bar.n = min(int(100 * self.budget.share), 100)
        best = "" if self.best is None else f"{self.best:.4f}"
        self.bar.set_postfix(best=best, trials=self.number, tokens=f"{self.budget.spent_tokens / 1e6:.2f}M")
