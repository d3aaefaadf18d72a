"""Running a search: trials are written down, the finalists are pruned for real."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ..common.devices import process_state, use_cpu
from ..common.output import OutputFolder
from ..data import Calibration
from ..pruning.allocation import ALLOCATIONS, Allocation
from ..pruning.configuration import DSAConfig
from .evaluator import Evaluator
from .objective import Objective
from .problem import UNIFORM, Budget, Problem, parse_budget
from .resolver import Resolver
from .result import RESULT_FILES, Finalist, SearchResult
from .space import Candidate, SearchSpace
from .strategies import STRATEGIES
from .trace import Request, SearchTrace, Trial


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
    report_to: Any = None,
) -> SearchResult:
    """The allocation that hurts `model` least at `config.sparsity`, found on validation text.

    Args:
        calibration: feeds statistics.
        validation: LongTensor (windows, length), disjoint from calibration and from any text that a result is reported
            on.
        config: sparsity, method, bounds, seed; its allocation is not looked at.
        strategy: a row of `STRATEGIES`.
        budget: validation tokens (a backward pass counts as two forward ones), evaluations, or seconds; see
            `parse_budget`.
        finalists: candidates that are ranked once more under the real, sequential prune, uniform besides. The budget
            has room left for them.
        folder: where the trace goes, as it grows; and at the end the result.
        resume: go on with the trace in `folder`; the end is that of an uninterrupted run.
        named: rows of `ALLOCATIONS` that are tried; by default all, where the strategy tries any.
        report_to: what accelerate can log to, such as "trackio" or "tensorboard", or a tracker.
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
    if named is None:
        named = ALLOCATIONS if STRATEGIES.fact(strategy, "named", True) else ()
    named = tuple(name for name in named if name != "uniform")
    with ExitStack() as stack:
        output = None
        if folder is not None and process_state().is_main_process:
            output = stack.enter_context(OutputFolder(folder, RESULT_FILES))
        logger = _Logger(report_to, folder, settings)
        stack.callback(logger.close)
        trace = SearchTrace.open(output and output.path / "trace.jsonl", settings, resume)
        stack.callback(trace.close)
        objective = Objective(model, calibration, validation, config)
        resolver = Resolver(model, objective.architecture, calibration, config, named)
        evaluator = Evaluator(objective, resolver)
        replayed = broadcast_object_list([trace.trials])[0] if evaluator.ranks.num_processes > 1 else trace.trials
        problem = _problem(resolver, validation, budget, named, config, space, finalists)
        conductor = _Conductor(evaluator, trace, budget, list(replayed), logger)
        ranking = conductor.conduct(run(problem))
        table = _table(conductor, problem, _finalists(ranking, resolver, finalists))
        result = SearchResult(config, table, trace, budget, tuple(problem.notes), _baselines(resolver))
        if output is not None:
            result.save(output)
        return result


def _problem(
    resolver: Resolver,
    validation: Tensor,
    budget: Budget,
    named: tuple[str, ...],
    config: DSAConfig,
    space: SearchSpace | None,
    finalists: int,
) -> Problem:
    """The problem with its budget but for what the finalists will take."""
    windows, length = validation.shape
    if space is None:
        kinds = tuple(dict.fromkeys(resolver.kinds.values()))
        space = SearchSpace(kinds=kinds) if len(kinds) <= 16 else SearchSpace()
    problem = Problem(space, resolver, windows, length, budget, named, random.Random(config.data.seed))
    needed = (finalists + 1) * (windows + problem.rungs[-1]) * length
    return problem.with_share(1 - (min(needed / budget.tokens, 0.5) if budget.tokens else 0.1))


def _table(conductor: _Conductor, problem: Problem, chosen: Sequence[Candidate]) -> tuple[Finalist, ...]:
    """The finalists by their loss after the sequential prune, beside that of one-shot masks of the dense model."""
    resolver = problem.resolver
    conductor.serve([Request("anchor", Candidate("dense", counts=(0,) * len(resolver.sizes)))])
    proxies = conductor.serve([Request("loss", candidate, 0, problem.rungs[-1]) for candidate in chosen])
    trials = conductor.serve([Request("sequential", candidate, 0, problem.windows) for candidate in chosen])
    table = [
        Finalist(
            candidate, trial.loss, trial.perplexity, proxy.loss, resolver.allocation(trial.counts, str(candidate))
        )
        for candidate, trial, proxy in zip(chosen, trials, proxies)
        if trial.loss is not None
    ]
    return tuple(sorted(table, key=lambda row: row.loss))


def _baselines(resolver: Resolver) -> dict[str, Allocation]:
    """Uniform and OWL, where they are possible within the bounds."""
    found = {}
    for name in ("uniform", "owl"):
        with suppress(ValueError):
            found[name] = resolver.allocation(resolver.counts(Candidate(name)), name)
    return found


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

    def __init__(
        self, evaluator: Evaluator, trace: SearchTrace, budget: Budget, earlier: list[Trial], logger: _Logger
    ):
        self.evaluator, self.trace, self.budget, self.logger = evaluator, trace, budget, logger
        self.earlier = earlier
        self.number = 0
        self.best: float | None = None
        hidden = True if not evaluator.ranks.is_main_process else None  # else as the user's switches say
        self.bar = tqdm(total=100, desc="Searching", unit="%", name="optimum_dsa.search", leave=False, disable=hidden)

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
            self.logger.log({"loss": trial.loss, "best": self.best, "tokens": self.budget.spent_tokens}, self.number)
        self.bar.n = min(int(100 * self.budget.share), 100)
        best = "" if self.best is None else f"{self.best:.4f}"
        self.bar.set_postfix(best=best, trials=self.number, tokens=f"{self.budget.spent_tokens / 1e6:.2f}M")


class _Logger:
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
