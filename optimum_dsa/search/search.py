"""Running a search: trials are written down, the finalists are pruned for real."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.output import OutputFolder
from ..common.ranks import current_ranks
from ..common.same_run import FINGERPRINTS
from ..model.fingerprint import fingerprint_of_model, fingerprint_of_tensors
from ..pruning.allocation import Allocation
from ..pruning.calibration import Calibration
from ..pruning.configuration import FREE, DSAConfig
from ..pruning.finished import TIMES
from ..pruning.structured.configuration import DSAStructuredConfig
from .apart import check_apart
from .conductor import Conductor, TrialLogger
from .evaluator import Evaluator
from .finals import FinalRound, rank
from .metric_space import MetricSpace
from .objective import Objective, check_predicts
from .prepared import check_search, metrics_for, names_for, prepared, realisation_of, remarks, without_allocation
from .problem import Budget, Problem, parse_budget
from .resolver import Resolver
from .result import RESULT_FILES, SearchResult
from .space import Candidate, SearchSpace
from .strategies import STRATEGIES
from .structures import StructureResolver
from .trace import SearchTrace


logger = logging.getLogger(__name__)


def search(
    model: nn.Module,
    calibration: Calibration,
    validation: Tensor,
    config: DSAConfig | DSAStructuredConfig,
    *,
    strategy: str = "auto",
    budget: str | int | Budget = "2M tokens",
    space: SearchSpace | None = None,
    finalists: int = 4,
    folder: str | Path | None = None,
    resume: bool = False,
    named: Sequence[str] | None = None,
    report_to: Any = None,
    realisation: str | None = None,
    pictures: Callable[[SearchResult], Mapping[str, Any]] | None = None,
) -> SearchResult:
    """The allocation that hurts `model` least at `config.sparsity`, found on validation text.

    Args:
        calibration: feeds statistics.
        validation: LongTensor (windows, length), disjoint from calibration and from any text that a result is reported
            on.
        config: sparsity, method, bounds, seed; its allocation is not looked at.
        strategy: a row of `STRATEGIES`.
        budget: validation tokens (a backward pass counts as two forward ones), evaluations, or seconds; see
            `parse_budget`. It is kept: what it has no room for is not looked at.
        finalists: candidates that are ranked once more under the real, sequential prune, uniform besides. The budget
            has room left for them; where it is small, for fewer, on fewer windows.
        folder: where the trace goes, as it grows; and at the end the result.
        resume: go on with the trace in `folder`; the end is that of an uninterrupted run.
        named: rows of `ALLOCATIONS` that are tried; by default all, where the strategy tries any.
        report_to: what accelerate can log to, such as "trackio" or "tensorboard", or a tracker.
        realisation: a row of `REALISATIONS`: what an allocation is while it is compared. By default "structures" for a
            `DSAStructuredConfig`; "database" where the method changes the weights that it keeps or the strategy reads
            error curves; else "masks".
        pictures: what draws figures of the result for `folder`, such as `plot_search`.

    Raises:
        ValueError: there is nothing to allocate, the model predicts no next tokens, validation windows are calibration
            windows, or the trace to go on with is of another model, of other texts or settings.
    """
    check_search(config)
    check_predicts(model)
    config = without_allocation(config)
    check_apart(calibration, validation)
    budget = parse_budget(budget)
    run = STRATEGIES[strategy]
    offsets = STRATEGIES.fact(strategy, "curves")
    kind = realisation_of(config, strategy, realisation)
    levels = {"offsets": offsets} if offsets and kind == "database" else {}
    metrics = metrics_for(model, config, strategy) if kind == "metrics" else MetricSpace()
    levels |= {"reads": metrics.reads} if kind == "metrics" else {}
    settings = _settings(strategy, budget, finalists, config, calibration, validation, kind)
    named = names_for(config, strategy, named)
    ranks = current_ranks()
    with ExitStack() as stack:
        stack.enter_context(ranks.together())
        output = None
        if folder is not None and ranks.is_first:
            output = stack.enter_context(OutputFolder(folder, RESULT_FILES))
        reports = TrialLogger(report_to, folder, settings)
        stack.callback(reports.close)
        trace = _trace(output, settings, resume, model, calibration, validation)
        stack.callback(trace.close)
        realised, resolver = prepared(config, model, calibration, kind, named, levels | _kept(kind, output, resume))
        evaluator = Evaluator(Objective(model, realised, validation, config.batch_size), resolver)
        # Only the first process has a folder to read; all have to replay the same trials.
        replayed = ranks.of_first(trace.trials)
        problem, final = _problem(resolver, validation, budget, named, config, space, finalists, strategy)
        problem = replace(problem, metrics=metrics)
        conductor = Conductor(evaluator, trace, budget, list(replayed), reports)
        ranking = conductor.conduct(run(problem), problem.until)
        table = rank(conductor.serve, problem, ranking, final)
        notes = (*problem.notes, *remarks(resolver, table))
        shifts = () if ranks.alone else tuple(ranks.gather(evaluator.shift))
        result = SearchResult(config, table, trace, budget, notes, _baselines(resolver), shifts)
        if output is not None:
            result.save(output, pictures)
        return result


def _settings(
    strategy: str,
    budget: Budget,
    finalists: int,
    config: DSAConfig,
    calibration: Calibration | None,
    validation: Tensor,
    kind: str,
) -> dict[str, Any]:
    """What a trace has to have been made with to be gone on with; `validation` is (windows, length)."""
    settings = {
        "strategy": strategy,
        "budget": [budget.tokens, budget.evaluations, budget.seconds],
        "finalists": finalists,
        # batch_size and activations change no result; allocation and spread are what is searched for.
        "config": {k: v for k, v in config.to_dict().items() if k not in ("allocation", "spread", *FREE)},
        "calibration": calibration.facts() if calibration else None,
        "validation": list(validation.shape),
    }
    if STRATEGIES.fact(strategy, "fixed"):  # of these an allocation is no outcome, but where they look
        settings["at"] = config.to_dict()["allocation"]
    # Masks were all there was: a trace that has no word of it goes on.
    return settings if kind == "masks" else settings | {"realisation": kind}


def _trace(
    output: OutputFolder | None,
    settings: Mapping[str, Any],
    resume: bool,
    model: nn.Module,
    calibration: Calibration | None,
    validation: Tensor,
) -> SearchTrace:
    """The trace to write to; in a folder with what tells the model and the texts apart from others.

    `validation` is (windows, length).
    """
    if output is None:
        return SearchTrace.open(None, settings)
    path, times = output.path / "trace.jsonl", output.path / TIMES
    if resume and not path.exists():
        logger.warning("%s holds no search to go on with; a new one begins.", output.shown)
    if settings.get("realisation") == "structures" and times.exists() and not resume:
        raise FileExistsError(f"{times} is of another search; resume it, or choose another folder.")
    prints = {
        "model": fingerprint_of_model(model),
        "calibration": None if calibration is None else fingerprint_of_tensors(calibration.inputs),
        "validation": fingerprint_of_tensors({"input_ids": validation}),
    }
    return SearchTrace.open(path, {**settings, FINGERPRINTS: prints}, resume)


def _kept(kind: str, output: OutputFolder | None, resume: bool) -> dict[str, Any]:
    """Options of a realisation that keeps something beside the trace."""
    return {"folder": output.path, "resume": resume} if kind == "structures" and output is not None else {}


def _problem(
    resolver: Resolver | StructureResolver,
    validation: Tensor,
    budget: Budget,
    named: tuple[str, ...],
    config: DSAConfig,
    space: SearchSpace | None,
    finalists: int,
    strategy: str,
) -> tuple[Problem, FinalRound]:
    """The problem with its budget but for what the finalists will take, and how these are ranked where it suffices.

    `validation` is (windows, length).
    """
    windows, length = validation.shape
    if space is None:
        kinds = tuple(dict.fromkeys(resolver.kinds.values()))
        space = SearchSpace(kinds=kinds) if len(kinds) <= 16 else SearchSpace()
    problem = Problem(space, resolver, windows, length, budget, named, random.Random(config.data.seed))
    if STRATEGIES.fact(strategy, "fixed"):
        problem = replace(problem, start=resolver.of_config())
    raced = 0 if STRATEGIES.fact(strategy, "curves") else problem.rungs[-1]
    final = FinalRound(finalists, windows, raced, not STRATEGIES.fact(strategy, "moves", False))
    return problem.with_share(1 - final.reserved(budget, length)), final


def _baselines(resolver: Resolver | StructureResolver) -> dict[str, Allocation]:
    """Uniform and OWL, where they are possible within the bounds."""
    found = {}
    for name in ("uniform", "owl"):
        with suppress(ValueError):
            found[name] = resolver.allocation(resolver.removed(Candidate(name)), name)
    return found
