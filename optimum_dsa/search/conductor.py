"""Between a strategy and what answers it: earlier trials come first, the budget is kept, progress is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..common.devices import use_cpu
from ..common.progress import Progress
from .evaluator import Evaluator
from .problem import Budget, Room, Search
from .space import Candidate
from .trace import Request, SearchTrace, Trial


class Conductor:
    """Passes requests from a strategy to the evaluator and trials back; trials of an earlier run come first."""

    def __init__(
        self, evaluator: Evaluator, trace: SearchTrace, budget: Budget, earlier: list[Trial], logger: TrialLogger
    ):
        self.evaluator, self.trace, self.budget, self.logger = evaluator, trace, budget, logger
        self.earlier = earlier
        self.number = 0
        self.best: float | None = None
        self._until: float | None = None  # the share of the budget that may be spent; `None` is no limit
        hidden = not evaluator.ranks.is_first
        self._shown = Progress("Searching", 100, "%", "optimum_dsa.search", hidden)

    def conduct(self, strategy: Search, until: float) -> list[Candidate]:
        """Run a strategy to its end, within `until` of the budget."""
        self._until = until
        try:
            requests = next(strategy)
            while True:
                requests = strategy.send(self.serve(requests))
        except StopIteration as end:
            return end.value
        finally:
            self._until = None
            self._shown.close()

    def serve(self, requests: Sequence[Request], room: Callable[[], Room] | None = None) -> list[Trial]:
        """The trials that answer `requests`, in order, each noted and paid for.

        `room` tells what may be spent on them, now that earlier trials are paid for; by default what is left of the
        strategy's part, and after its end all that it takes.
        """
        trials = []
        while self.number < len(self.earlier) and len(trials) < len(requests):
            trial = self.earlier[self.number]
            # A strategy draws from a seeded source, so that it asks the same again, as long as nothing has changed.
            if trial.request != requests[len(trials)]:
                raise ValueError(
                    f"Trial {self.number} of the trace is {trial.request.candidate}, but this search asks for "
                    f"{requests[len(trials)].candidate}: was it made by another version or with other options?"
                )
            self.evaluator.replay(trial)
            self._note(trial)
            trials.append(trial)
        if len(trials) < len(requests):
            # The last round is cut to what is left before it begins.
            left = room() if room is not None else self._room()
            for trial in self.evaluator.answer(requests[len(trials) :], self.number, left):
                self.trace.append(trial)
                self._note(trial)
                trials.append(trial)
        return trials

    def _room(self) -> Room | None:
        """What is left for the strategy that is conducted; `None`, no limit, where none is."""
        return None if self._until is None else self.budget.room(self._until)

    def _note(self, trial: Trial) -> None:
        self.number += 1
        self.budget.add(trial)
        if trial.loss is not None and trial.request.kind == "loss":
            self.best = trial.loss if self.best is None else min(self.best, trial.loss)
            self.logger.log({"loss": trial.loss, "best": self.best, "tokens": self.budget.spent_tokens}, self.number)
        self._shown.show(
            min(int(100 * self.budget.share), 100),
            trials=str(self.number),
            tokens=f"{self.budget.spent_tokens / 1e6:.2f}M",
            proxy="" if self.best is None else f"{self.best:.4f}",
        )


class TrialLogger:
    """Trials for experiment trackers, through accelerate; nothing where none is asked for."""

    def __init__(self, report_to: Any, folder: str | Path | None, settings: Mapping[str, Any]):
        self.accelerator = None
        if report_to is not None:
            self.accelerator = Accelerator(log_with=report_to, project_dir=folder, cpu=use_cpu())
            if not self.accelerator.log_with:
                raise ValueError(f"Cannot report to {report_to!r}: install it first, for example pip install trackio.")
            self.accelerator.init_trackers("optimum-dsa-search", {"strategy": settings["strategy"]})

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.accelerator is not None:
            self.accelerator.log(dict(values), step=step)

    def close(self) -> None:
        if self.accelerator is not None:
            self.accelerator.end_training()
