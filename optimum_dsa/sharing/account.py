"""What was done to the weights of a model, in words and tables: who chose what went, what became of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..common.settings import flattened, sections_of
from ..pruning.configuration import DSAConfig
from ..pruning.structured.configuration import DSAStructuredConfig
from ..pruning.structured.importance import chosen_by, is_made_up_for
from ..pruning.unstructured.updates import UPDATES
from ..recovery.configuration import OF_ADAPTERS, OF_ZEROS, RecoveryConfig
from ..recovery.recoveries import RECOVERIES
from .outcome import Outcome
from .tables import Table, percent, width_table


NAMED = 4  # matrices of a row that are named, where more stayed dense for one reason
# What a budget of a model that was trained sparse has of a config, whose method nobody asked.
OF_BUDGET = ("sparsity", "allocation", "pattern", "granularity", "exclude", "include", "blocks")
# Settings that say nothing where what they belong to was not asked for.
IDLE = {"reconstruct": ("reconstruct", "rate", "span", "apart"), "distill": ("distill",), "permute": ("permute",)}
IDLE["values"] = ("values", "group", "scales", "feedback")

_WHOLE = "Then the whole model was trained towards the predictions of the dense one"


def account(outcome: Outcome) -> list[str]:
    """What became of the weights of a pruned model, in the order in which it was done; a sentence each."""
    if not outcome.achieved:
        return []
    before = outcome.report.trained_before if outcome.report else ()
    cuts = (*outcome.structured.get("earlier", ()), outcome.structured) if outcome.structured else ()
    told = [
        *map(_cut, cuts),
        *map(_trained_before, before),
        *(() if outcome.is_only_cut else _pruned(outcome)),
        *map(_trained, outcome.trainings),
    ]
    found = outcome.is_found and not outcome.is_only_cut
    report = outcome.report
    trained = before or outcome.trainings or found or report is None or report.reconstruction or report.distillation
    if not trained and not any(one["reconstruction"] or one.get("distillation") for one in cuts):
        told.append("It was not trained.")
    return told


def _cut(cut: Mapping[str, Any]) -> str:
    """A sentence of what was cut out at one time, and what made up for it."""
    config, removed, parameters = cut["config"], cut["removed"], cut["parameters"]
    chosen = (
        f"chosen by {chosen_by(config)}"
        if config.get("learner")
        else f"the least important by {chosen_by(config)} first"
    )
    update = config.get("update", "refit") if is_made_up_for(config) else "none"
    made_up = {
        "refit": "what read them was fitted anew, by least squares on the calibration text",
        "bias": "the mean of what they gave was added to biases",
        "none": "the weights that stay were left as they were",
    }
    trained = ", and blocks were trained towards the output of the dense one" if cut["reconstruction"] else ""
    trained += f". {_WHOLE}" if cut.get("distillation") else ""
    found = cut.get("tolerance") or {}
    rise = f", as many as a rise of perplexity by {found['max_loss']:.1%} allowed in trials" if found else ""
    return (
        f"{removed:,} of {parameters:,} parameters were cut out{rise}, {chosen}; {made_up.get(update, '')}{trained}."
        f"{_of_other_costs(cut)}"
    )


def _of_other_costs(cut: Mapping[str, Any]) -> str:
    """What of the blocks went with them, in a sentence; "" where nothing was counted."""
    words = {"flops": "operations for a token", "kv": "bytes of a token in the cache", "latency": "measured time"}
    counted = {words[name]: share for name, share in (cut.get("shares") or {}).items() if name in words}
    shares = [f"{percent(share)} of the {what}" for what, share in counted.items()]
    return f" That is {', '.join(shares)} of all blocks." if shares else ""


def _pruned(outcome: Outcome) -> Iterator[str]:
    if outcome.is_found:
        yield "Nothing says how the zeros came about: they were found in the model."
    # Of names that are registered elsewhere nobody knows here what they do.
    if outcome.is_found or outcome.was_trained_sparse or outcome.report is None:
        return
    config, report = outcome.report.config, outcome.report
    moved = " Channels were put in another order, in which the model computes the same." if report.permuted else ""
    if config.resolved.updates:
        whose = "the dense model" if config.update.targets == "dense" else "their own matrix"
        update = config.recipe.update
        text = "" if UPDATES.fact(update, "reads", "nothing") == "nothing" else ", on the calibration text,"
        yield f"The weights that stay were changed by {update}{text} to keep the outputs of {whose}.{moved}"
    elif not config.values.bits and not (
        any(found.steps for found in report.reconstruction.values())
        or report.distillation.get("steps")
        or any(training.get("schedule") for training in outcome.trainings)
    ):
        whose = "as they were" if report.trained_before or report.structured else "as the base model has them"
        yield f"Pruning chose what goes and left the weights that stay {whose}.{moved}"
    elif moved:
        yield moved.strip()
    if bits := config.values.bits:
        shared = f"every {config.values.group} columns of a row" if config.values.group else "every row"
        yield f"The weights that stay became whole numbers of {bits} bits, times a scale for {shared}."
    if trained := report.reconstruction:
        better = [found for found in trained.values() if found.steps]
        end = "" if better else ", which brought none nearer to it, so that they are what they were"
        yield f"Blocks were trained for {config.reconstruct.steps} steps towards the output of the dense one{end}."
    if report.distillation:
        end = "" if report.distillation["steps"] else ", which brought it no nearer"
        yield f"{_WHOLE}{end}."


def _trained(training: Mapping[str, Any]) -> str:
    if training.get("kind") != "recover":
        how = "It was pruned in the course of a training" if training.get("schedule") else "Then it was trained"
        return f"{how} with DSACallback, up to step {training.get('step')}."
    asked = training["config"]
    method = f"{training['steps']} steps by recover with the method {asked['method']}"
    if asked.get("sparsity") is not None:
        return f"It was dense, and was trained for {method}, which chose its zeros meanwhile."
    zeros = "chose its zeros anew" if Outcome.moves_zeros(training) else "kept every zero"
    return f"Then it was trained for {method}, which {zeros}."


def _trained_before(training: Mapping[str, Any]) -> str:
    method = (training.get("config") or {}).get("method")
    how = f"{training.get('steps')} steps by recover with the method {method}" if method else "with DSACallback"
    return f"Before it was pruned, the model was trained: {how}."


def notes(outcome: Outcome) -> list[str]:
    """What pruning noted beside the shares of each block: damping, order of channels, losses of training, ..."""
    if not outcome.report or not outcome.achieved:
        return []
    return replace(outcome.report, structured=None).notes  # which the account tells


def details(outcome: Outcome) -> list[tuple[str, str, Table]]:
    """Heading, caption and table of what is long, and only of what there is something to say of."""
    found = []
    if outcome.structured:
        caption = "Structures that stay in every block, of those that the dense model has."
        found.append(("Widths", caption, width_table(outcome)))
    if trained := outcome.facts.get("reconstruction") or outcome.structured.get("reconstruction"):
        rows = [
            [
                block,
                percent(one["before"]),
                percent(one["after"]),
                f"{one['rate']:g}" if one["steps"] else "–",
                str(one["steps"] or "as it was"),
            ]
            for block, one in trained.items()
        ]
        caption = (
            "Share of the block's output that is lost, on calibration windows that were held out, and after how many "
            "steps it was lowest."
        )
        span = (outcome.config.get("reconstruct") or {}).get("span") or 1
        caption += " Of blocks that were trained together the last stands for all." if span > 1 else ""
        table = Table(["block", "lost before", "lost after", "rate", "steps"], rows)
        found.append(("Training of the blocks", caption, table))
    if dense := outcome.facts.get("dense"):
        reasons: dict[str, list[str]] = {}
        for name, why in dense.items():
            reasons.setdefault(why, []).append(name)
        rows = [[why, str(len(names)), _some(names)] for why, names in reasons.items()]
        heads = ["why", "number", "matrices"]
        if sizes := outcome.facts.get("dense_sizes"):
            everything = sum(outcome.facts["allocation"]["sizes"].values()) + sum(sizes.values())
            heads.append("of the blocks' weights")
            for row, names in zip(rows, reasons.values()):
                row.append(percent(sum(sizes.get(name, 0) for name in names) / everything))
        table = Table(heads, rows)
        found.append(("What stayed dense", "Matrices of the blocks, outside the budget.", table))
    return found


def settings(outcome: Outcome) -> dict[str, Any]:
    """Every setting that had a say, those of sections by their own names; what the method has where none was given.

    Of a model out of which structures were cut and nothing else, those of the cut.
    """
    if outcome.is_only_cut:
        return cut_settings(outcome)
    if outcome.is_found:
        return {}
    found = flattened(DSAConfig, outcome.config)
    if outcome.was_trained_sparse:
        return {name: found[name] for name in OF_BUDGET if name in found}
    if outcome.report:
        recipe = outcome.report.config.recipe
        found |= {"metric": recipe.metric, "update": recipe.update, "pattern": recipe.pattern}
    idle = {part for name, parts in IDLE.items() if not found.get(name) for part in parts}
    idle |= set() if outcome.facts.get("calibration") else set(sections_of(DSAConfig)["data"])
    return {name: value for name, value in found.items() if name not in idle and value not in (None, "", [])}


def cut_settings(outcome: Outcome) -> dict[str, Any]:
    """Every setting of the last cut that had a say, those of sections by their own names; empty where none was."""
    found = flattened(DSAStructuredConfig, (outcome.structured.get("config") or {}))
    idle = {part for name in ("reconstruct", "distill") for part in IDLE[name] if not found.get(name)}
    return {name: value for name, value in found.items() if name not in idle and value not in (None, "", [])}


def training_settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a training that had a say, those of sections by their own names."""
    found = flattened(RecoveryConfig, training.get("config") or {})
    method = found.get("method")
    idle = () if Outcome.moves_zeros(training) else OF_ZEROS
    if method in RECOVERIES and RECOVERIES.fact(method, "trains_weights", True):
        idle += OF_ADAPTERS
    idle += () if found.get("distillation") else ("distillation", "temperature")
    return {name: value for name, value in found.items() if name not in idle}


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
