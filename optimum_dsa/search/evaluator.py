"""Answers to what a strategy asks: each allocation looked at once, over the ranks of a distributed run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from ..common.devices import process_state
from .objective import Objective
from .resolver import Resolver
from .trace import Request, Trial


class Evaluator:
    """Answers requests, each allocation once; over the ranks of a distributed run where there are some."""

    def __init__(self, objective: Objective, resolver: Resolver):
        self.objective, self.resolver = objective, resolver
        self.ranks = process_state()
        self.known: dict[tuple, Any] = {}
        self.anchor: tuple[int, ...] | None = None
        self.length = objective.validation.shape[1]

    def replay(self, trial: Trial) -> None:
        """Learn what a trial of an earlier run found out, without computing anything."""
        if trial.request.kind == "anchor":
            self._move(trial.counts)
        elif trial.error is None:
            self.known[self._key(*_job(trial.request, trial.counts))] = (trial.loss, trial.slopes, trial.perplexity)

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
            self.known[self._key(*job)] = costs[job][:3]
        trials = []
        for number, (request, counts, error) in enumerate(prepared, first):
            if error is not None or request.kind == "anchor":
                trials.append(Trial(number, request, counts=counts, error=error))
                continue
            loss, slopes, perplexity = self.known[self._key(*_job(request, counts))]
            spent = costs.pop(_job(request, counts), None)  # a repetition costs nothing
            tokens = 0 if spent is None else len(request.rows) * self.length * (3 if request.kind == "slopes" else 1)
            error = None if loss == loss else "the loss is not a number"
            loss = loss if error is None else None
            seconds = 0.0 if spent is None else spent[3]
            trials.append(Trial(number, request, loss, slopes, tokens, seconds, counts, error, perplexity))
        return trials

    def _compute(self, jobs: Sequence[tuple]) -> list[tuple]:
        """(loss, slopes, perplexity, seconds) of each job, in order, their batches spread over the ranks."""
        batches = [_batches(*job, self.objective.config.batch_size) for job in jobs]
        tasks = [task for parts in batches for task in parts]
        if self.ranks.num_processes == 1:
            done = [self._one(*task) for task in tasks]
        else:
            with self.ranks.split_between_processes(tasks) as mine:
                # who would have none does the last as well, for its own scores to be at the anchor; it counts once
                done = gather_object([self._one(*task) for task in mine or tasks[-1:]])
        answers = iter(done)
        return [_joined(parts, [next(answers) for _ in parts]) for parts in batches]

    def _one(self, kind: str, counts: tuple[int, ...], start: int, stop: int) -> tuple:
        began = time.perf_counter()
        by_name, rows = dict(zip(self.resolver.sizes, counts)), range(start, stop)
        slopes = perplexity = None
        if kind == "slopes":
            loss, found = self.objective.slopes(by_name, rows)
            slopes = tuple(found[name] for name in self.resolver.sizes)
        elif kind == "sequential":
            loss, perplexity = self.objective.sequential(by_name, rows)
            self._move(self.anchor)
        else:
            loss = self.objective.loss(by_name, rows)
        return loss, slopes, perplexity, time.perf_counter() - began

    def _move(self, counts: tuple[int, ...] | None) -> None:
        self.anchor = counts if counts is not None and any(counts) else None  # nothing removed: the dense model
        anchor = None if self.anchor is None else dict(zip(self.resolver.sizes, self.anchor))
        self.objective.move_anchor(anchor)

    def _key(self, kind: str, counts: tuple[int, ...], start: int, stop: int) -> tuple:
        """What an answer depends on: a sequential one not on the anchor."""
        return (None if kind == "sequential" else self.anchor, kind, counts, start, stop)


def _job(request: Request, counts: tuple[int, ...] | None) -> tuple:
    return (request.kind, counts, request.start, request.stop)


def _batches(kind: str, counts: tuple[int, ...] | None, start: int, stop: int, size: int) -> list[tuple]:
    """A job as jobs of one batch each, where it can be taken apart."""
    if kind != "loss":
        return [(kind, counts, start, stop)]
    return [(kind, counts, first, min(first + size, stop)) for first in range(start, stop, size)]


def _joined(parts: Sequence[tuple], answers: Sequence[tuple]) -> tuple:
    """The answer to a job from those to its batches."""
    if len(parts) == 1:
        return answers[0]
    windows = [stop - start for _, _, start, stop in parts]
    loss = sum(count * answer[0] for count, answer in zip(windows, answers)) / sum(windows)
    return (loss, None, None, sum(answer[3] for answer in answers))
