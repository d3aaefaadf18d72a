"""Answers to what a strategy asks: each allocation looked at once, over the ranks of a distributed run."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..common.ranks import current_ranks
from .efficiency import Shift
from .objective import Objective
from .problem import Room
from .resolver import Resolver
from .trace import NO_ROOM, Request, Trial


Counts = tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """Something to compute: all that its answer depends on, the anchor aside."""

    kind: str
    counts: Counts
    start: int
    stop: int
    metric: str | None = None

    @property
    def windows(self) -> int:
        return self.stop - self.start

    def batches(self, size: int) -> list[Job]:
        """The job as jobs of `size` windows at most, where it can be taken apart."""
        # A prune would be made anew for every part, and slopes belong to all windows of a job.
        if self.kind != "loss":
            return [self]
        starts = range(self.start, self.stop, size)
        return [replace(self, start=start, stop=min(start + size, self.stop)) for start in starts]


@dataclass(frozen=True)
class Answer:
    """What came out of a job, and the seconds that it took."""

    loss: float
    slopes: tuple[float, ...] | None = None
    perplexity: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Question:
    """A request with the allocation that its candidate becomes, or with the error that it has none."""

    request: Request
    counts: Counts | None = None
    error: str | None = None

    @property
    def job(self) -> Job | None:
        """What has to be computed for it; `None` where nothing has."""
        if self.error is not None or self.request.kind == "anchor":
            return None
        asked = self.request
        return Job(asked.kind, self.counts, asked.start, asked.stop, asked.candidate.metric)


class Evaluator:
    """Answers requests, each allocation once; over the ranks of a distributed run where there are some."""

    def __init__(self, objective: Objective, resolver: Resolver):
        self.objective, self.resolver = objective, resolver
        self.ranks, self.shift = current_ranks(), Shift()
        self.known: dict[tuple, Answer] = {}
        self.anchor: Counts | None = None
        self.length = objective.validation.shape[1]

    def replay(self, trial: Trial) -> None:
        """Learn what a trial of an earlier run found out, without computing anything."""
        if trial.request.kind == "anchor":
            self._move(trial.counts)
        elif trial.error is None:
            job = Question(trial.request, trial.counts).job
            self.known[self._key(job)] = Answer(trial.loss, trial.slopes, trial.perplexity)

    def answer(self, requests: Sequence[Request], first: int, room: Room | None = None) -> list[Trial]:
        """The trials of `requests`, numbered from `first`; the same on every rank.

        What is known costs nothing. Of what is not, as much is computed as there is room for, in the order of the
        requests; the trials of the rest have the error `NO_ROOM`.
        """
        questions = [self._question(request) for request in requests]
        for question in questions:
            # Before anything is computed: one call never mixes anchors.
            if question.request.kind == "anchor":
                self._move(question.counts)
        jobs = dict.fromkeys(question.job for question in questions if question.job is not None)
        fresh = [job for job in jobs if self._key(job) not in self.known]
        computed = self._compute_within(fresh, room or Room())
        self.known |= {self._key(job): answer for job, answer in computed.items()}
        trials = []
        for number, question in enumerate(questions, first):
            # what is asked again within one call costs nothing the second time
            trials.append(self._trial(number, question, computed.pop(question.job, None)))
        return trials

    def _question(self, request: Request) -> Question:
        try:
            return Question(request, self.resolver.removed(request.candidate))
        except ValueError as error:
            return Question(request, None, str(error))

    def _trial(self, number: int, question: Question, computed: Answer | None) -> Trial:
        request, job = question.request, question.job
        if job is None:
            return Trial(number, request, counts=question.counts, error=question.error)
        answer = self.known.get(self._key(job))
        if answer is None:
            return Trial(number, request, counts=question.counts, error=NO_ROOM)
        # NaN is the one number that is not itself.
        broken = answer.loss != answer.loss
        return Trial(
            number,
            request,
            None if broken else answer.loss,
            answer.slopes,
            0 if computed is None else self.tokens(job),
            0.0 if computed is None else computed.seconds,
            question.counts,
            "the loss is not a number" if broken else None,
            answer.perplexity,
        )

    def tokens(self, job: Job) -> int:
        """Validation tokens that a job costs; a backward pass counts as two forward passes."""
        return job.windows * self.length * (3 if job.kind == "slopes" else 1)

    def _compute_within(self, jobs: Sequence[Job], room: Room) -> dict[Job, Answer]:
        """The answers to the first of the jobs, as many as there is room for."""
        if room.seconds is not None:  # what a job takes is known after it alone
            answers: dict[Job, Answer] = {}
            for start in range(0, len(jobs), self.ranks.count):
                if sum(answer.seconds for answer in answers.values()) >= room.seconds:
                    break
                part = jobs[start : start + self.ranks.count]  # one for each rank
                answers |= zip(part, self._compute(part))
            return answers
        tokens, within = 0, []
        for job in jobs:
            tokens += self.tokens(job)
            # Stops at the first that does not fit: a cheaper one behind it would jump the queue.
            if not room.holds(tokens, len(within) + 1):
                break
            within.append(job)
        return dict(zip(within, self._compute(within)))

    def _compute(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answer to each job, in order, their batches spread over the ranks."""
        batches = [job.batches(self.objective.batch_size) for job in jobs]
        tasks = [task for parts in batches for task in parts]
        shares = self.ranks.shares(len(tasks))
        first = sum(shares[: self.ranks.index])
        # who would have none does the last as well, for its own scores to be at the anchor; it counts once
        own = [self._one(task) for task in tasks[first : first + shares[self.ranks.index]] or tasks[-1:]]
        began = time.perf_counter()
        answers = iter([answer for each in self.ranks.gather(own) for answer in each] if tasks else [])
        self.shift.waited += time.perf_counter() - began
        return [_joined(parts, [next(answers) for _ in parts]) for parts in batches]

    def _one(self, job: Job) -> Answer:
        began = time.perf_counter()
        by_name, rows = dict(zip(self.resolver.sizes, job.counts)), range(job.start, job.stop)
        slopes = perplexity = None
        self.objective.take_metric(job.metric)
        if job.kind == "slopes":
            loss, found = self.objective.slopes(by_name, rows)
            slopes = tuple(found[name] for name in self.resolver.sizes)
        elif job.kind == "errors":
            found = self.objective.errors(by_name)
            slopes = tuple(found[name] for name in self.resolver.sizes)
            loss = sum(map(operator.mul, slopes, self.resolver.sizes.values())) / sum(self.resolver.sizes.values())
        elif job.kind == "sequential":
            loss, perplexity = self.objective.sequential(by_name, rows)
        else:
            loss = self.objective.loss(by_name, rows)
        seconds = time.perf_counter() - began
        self.shift.seconds += seconds
        self.shift.tokens += self.tokens(job)
        return Answer(loss, slopes, perplexity, seconds)

    def _move(self, counts: Counts | None) -> None:
        self.anchor = counts if counts is not None and any(counts) else None  # nothing removed: the dense model
        anchor = None if self.anchor is None else dict(zip(self.resolver.sizes, self.anchor))
        self.objective.move_anchor(anchor)

    def _key(self, job: Job) -> tuple[Counts | None, Job]:
        """What an answer depends on: a sequential one not on the anchor."""
        return (None if job.kind == "sequential" else self.anchor), job


def _joined(parts: Sequence[Job], answers: Sequence[Answer]) -> Answer:
    """The answer to a job from those to its batches."""
    if len(parts) == 1:
        return answers[0]
    windows = sum(part.windows for part in parts)
    loss = sum(part.windows * answer.loss for part, answer in zip(parts, answers)) / windows
    return Answer(loss, seconds=sum(answer.seconds for answer in answers))
