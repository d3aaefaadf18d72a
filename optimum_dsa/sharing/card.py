"""The model card of a pruned model."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoint.description import seal_of
from ..checkpoint.verify import SEALS
from ..common.escaping import code_block, code_span, inline_markdown, one_line, prose_markdown, table_cell
from ..common.installation import how_to_install
from ..evaluation.comparison import main_metric
from ..evaluation.measurement import Measurement, with_error
from ..pruning.allocation import Allocation
from ..pruning.configuration import DSAConfig
from ..pruning.structured.described import parameters_before, stay_of
from .account import account, cut_settings, details, notes, settings, training_settings
from .benefit import benefits
from .outcome import Outcome
from .provenance import (
    calibration_source,
    command,
    commands,
    dataset_id,
    is_repository,
    last_part,
    mixture,
    names_data,
    papers,
    recover_command,
    without_places,
)
from .tables import Table, block_table, limits, of_the_base, percent, perplexity_tables, task_tables
from .usage import usage


# The Hub knows finetune, adapter, merge and quantized. Pruned weights are the base model's own, compressed with loss.
PRUNED, TRAINED = "quantized", "finetune"
RECORDED = "This is as it was recorded beside the model; it was not measured again when this card was written."
# What a base model's card may say of itself, to be said again.
_METADATA = {
    "license": r"[A-Za-z0-9.+-]{1,64}",
    "license_name": r"[A-Za-z0-9_. +-]{1,96}",
    "license_link": r"https?://[A-Za-z0-9_.~%/?#=&+:-]{1,256}|[A-Za-z0-9_.-]{1,96}",
    "language": r"[A-Za-z-]{1,16}",
}


def model_card(
    outcome: Outcome,
    repo_id: str,
    model_config: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    plots: Mapping[str, str] | None = None,
    present: Collection[str] = ("tokenizer.json",),
    uncounted: str = "",
    adapter_base: str | None = None,
) -> ModelCard:
    """The card of `outcome`, with nothing in it that says where it was made, and no text in it that is markup.

    Without `outcome.counted`, what was counted in the weights, the card has no figure of the zeros.

    Args:
        outcome: of a pruned model.
        repo_id: where it will be.
        model_config: the content of the model's `config.json`.
        base: what the base model's card says of "license", "license_name", "license_link" and "language".
        plots: "allocation" and "heatmap" -> path in the repository.
        present: names of the files that will be beside the model.
        uncounted: why the zeros were not counted, where they were not.
        adapter_base: of an adapter, the repository of the pruned model under it.
    """
    facts = without_places(outcome.facts)
    config = DSAConfig.from_dict(facts["config"])
    base_id, revision = base_repository(facts)
    used = usage(model_config, present)
    name = repo_id.rpartition("/")[2]
    shown = replace(
        outcome, name=name, evaluations=_portable(outcome.evaluations, name), parent=_portable(outcome.parent)
    )
    data = _metadata(shown, facts, name, used.task, base or {}, adapter_base)
    base_name = (facts.get("base_model") or {}).get("name")
    made = _made(outcome, facts, base_name)
    made = f"{made} --trust-remote-code" if made and used.trusted else made
    told = replace(outcome, facts=facts)
    return ModelCard.from_template(
        data,
        template_str=files("optimum_dsa.sharing").joinpath("templates/model_card.md").read_text(encoding="utf-8"),
        name=name,
        repo_id=repo_id,
        adapter_base=adapter_base,
        base_link=f"[{inline_markdown(base_id)}](https://huggingface.co/{base_id})" if base_id else None,
        base_name=code_span(base_name) if base_name else None,
        counted=_counted(outcome),
        cut=_cut(outcome),
        only_cut=outcome.is_only_cut,
        uncounted=inline_markdown(uncounted),
        found=outcome.is_found,
        method=outcome.config["method"],
        allocation=code_span(facts["allocation"]["name"]),
        pattern=config.recipe.pattern,
        compressed=outcome.compressed,
        install=how_to_install(),
        usage=used,
        plots=plots,
        results=_results(shown),
        benefit=_benefit(shown),
        account=prose_markdown(" ".join(account(told))),
        training=_training(outcome),
        limits=_limits(outcome),
        command=made and code_block(made, "bash"),
        note=_note(facts, made, revision),
        notes=[prose_markdown(note) for note in notes(told)],
        details=[(heading, caption, table.markdown()) for heading, caption, table in details(told)],
        settings=_settings(told),
        trained_sparse=outcome.was_trained_sparse,
        recoveries=[_recovery(training) for training in outcome.trainings],
        versions=Table(["package", "version"], [*map(list, (facts.get("versions") or {}).items())]).markdown(),
        seal=SEALS.get(seal_of(outcome.facts), ""),
        papers={inline_markdown(part): address for part, address in _papers(told).items()},
    )


def _metadata(
    shown: Outcome,
    facts: Mapping[str, Any],
    name: str,
    task: str | None,
    base: Mapping[str, Any],
    adapter_base: str | None,
) -> ModelCardData:
    """What the Hub reads of a card."""
    base_id, _ = base_repository(facts)
    kinds = ["structured"] * bool(shown.structured) + ["sparse"] * (not shown.is_only_cut)
    return ModelCardData(
        model_name=name,
        library_name="peft" if adapter_base else "transformers",
        pipeline_tag=task,
        base_model=adapter_base or base_id,
        base_model_relation="adapter" if adapter_base else _relation(shown) if base_id else None,
        tags=["optimum-dsa", "pruned", *kinds, *_tags(shown)],
        datasets=[found] if (found := dataset_id(calibration_source(_calibrated(facts)))) else None,
        eval_results=_eval_results(shown.evaluations) or None,
        **_plain_metadata(base),
    )


def _calibrated(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a description that says what calibrated: of weights, or where none were pruned of the cut."""
    return facts if facts.get("calibration") else facts.get("structured") or facts


def _cut(outcome: Outcome) -> dict[str, str]:
    """What was cut out, as the file says, which holds of the widths that were counted; empty where nothing was."""
    if not outcome.structured:
        return {}
    before, now = parameters_before(outcome.structured), outcome.achieved["parameters"]
    return {
        "removed": f"{before - now:,}",
        "before": f"{before:,}",
        "share": percent(1 - now / before),
        "stay": code_span(stay_of(outcome.widths)),
    }


def _limits(outcome: Outcome) -> str:
    base = of_the_base(outcome, shared=True)
    return f"{limits(outcome)} {inline_markdown(base)}" if base else limits(outcome)


def _papers(outcome: Outcome) -> dict[str, str]:
    # Of zeros that were found a config has what it must have, and nobody asked for it.
    cut = outcome.structured
    cuts = [one["config"] for one in (*cut.get("earlier", ()), cut)] if cut else []
    return papers({} if outcome.is_found else outcome.facts["config"], outcome.trainings, cuts)


def _relation(outcome: Outcome) -> str:
    return TRAINED if outcome.training else PRUNED


def _made(outcome: Outcome, facts: Mapping[str, Any], base: str | None) -> str:
    """The command that makes the zeros; empty where nothing says how they came about."""
    if outcome.structured:
        trained = f"\n{recover_command(outcome.trainings[0], 'OUT')}" if outcome.was_trained_sparse else ""
        return commands(facts, outcome.is_found or bool(trained)) + trained
    if outcome.is_found:
        return ""
    # A dense model that was trained sparse was never pruned before: its first command is that of its training.
    return recover_command(outcome.trainings[0], base) if outcome.was_trained_sparse else command(facts)


def _counted(outcome: Outcome) -> dict[str, str]:
    """The figures of the zeros, as they were counted; empty where they were not."""
    found = outcome.counted
    if found is None:
        return {}
    shares = {unit: found.zeros[unit] / max(size, 1) for unit, size in found.sizes.items()}
    blocks = block_table({"removed": Allocation(shares, dict(found.sizes))})
    return {
        "sparsity": percent(found.removed / max(found.prunable, 1)),
        "removed": f"{found.removed:,}",
        "prunable": f"{found.prunable:,}",
        "overall": percent(found.removed / max(found.parameters, 1)),
        "blocks": blocks.markdown(),
    }


def _plain_metadata(base: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a base model's card says, texts that are what their keys mean; its author may have written anything."""
    found = {}
    for key, form in _METADATA.items():
        value = base.get(key)
        parts = value if isinstance(value, list) else [value]
        if value and all(isinstance(part, str) and re.fullmatch(form, part) for part in parts):
            found[key] = value
    return found


def _training(outcome: Outcome) -> str:
    """What is known of the last training after pruning, or during it, in words: with its losses."""
    recovery = outcome.training
    if not recovery:
        return ""
    if recovery.get("kind") != "recover":
        return f"It was trained with `DSACallback`, up to step {recovery.get('step')}."
    asked, perplexity = recovery["config"], recovery["perplexity"]
    before, after = (with_error(perplexity[name], perplexity.get(f"{name}_error"), 3) for name in ("before", "after"))
    zeros = "which chose its zeros within the budget" if outcome.moves_zeros(recovery) else "with every zero kept"
    when = "It" if outcome.was_trained_sparse else "After pruning it"
    return (
        f"{when} was trained for {recovery['steps']} steps ({code_span(str(asked['method']))}), {zeros}: "
        f"perplexity on validation text {before} before and {after} after. {RECORDED}"
    )


def base_repository(facts: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Hub id and revision of the base model; `None` for a local folder, whose name may mean another model there."""
    base = facts.get("base_model") or {}
    name, revision = base.get("name"), base.get("revision")
    return (name, revision) if is_repository(name, alone=bool(revision)) else (None, None)


def _tags(outcome: Outcome) -> list[str]:
    """What chose the zeros and the allocation as tags, where they are known and have plain names."""
    if outcome.is_found:
        return []
    allocation = outcome.facts["allocation"]["name"]
    return [outcome.config["method"], *([f"{allocation}-allocation"] if re.fullmatch(r"[a-z_]+", allocation) else [])]


def _portable(found: Sequence[Measurement], name: str | None = None) -> list[Measurement]:
    """Measurements without paths of this computer; with the model's `name` there."""
    return [
        replace(
            one,
            model=name or last_part(one.model),
            protocol=one.protocol and replace(one.protocol, dataset=last_part(one.protocol.dataset)),
        )
        for one in found
    ]


def _eval_results(found: Sequence[Measurement]) -> list[EvalResult]:
    """What the Hub shows beside the model: perplexities and tasks' main metrics."""
    results = []
    for one in found:
        if one.protocol is not None and one.perplexity is not None and math.isfinite(one.perplexity):
            dataset, named = one.protocol.dataset, one_line(str(one.protocol))
            results.append(_eval_result(dataset_id(dataset) or dataset, named, "perplexity", one.perplexity))
        for task in one.tasks:
            metric = main_metric([one], task)
            results.append(_eval_result(task, one_line(task), metric, one.tasks[task][metric]["value"]))
    return [result for result in results if math.isfinite(result.metric_value)]


def _eval_result(dataset: str, name: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^A-Za-z0-9_./-]", "-", dataset),
        dataset_name=name,
        metric_type=re.sub(r"[^A-Za-z0-9_.-]", "-", metric),
        metric_value=round(value, 4) if math.isfinite(value) else value,
    )


def _results(outcome: Outcome) -> str:
    """A table per protocol, the dense model's row first."""
    parts = []
    for protocol, table in perplexity_tables([outcome]):
        difference = ", and the difference to the first row over the windows that both met"
        parts += [
            f"Perplexity on {inline_markdown(str(protocol))}, with its standard error"
            f"{difference if 'difference' in table.header else ''}; lower is better.",
            table.markdown(),
        ]
    for protocol, table in task_tables([outcome]):
        parts += [f"Tasks of lm-eval: {inline_markdown(str(protocol))}; higher is better.", table.markdown()]
    if not parts:
        return "Neither a perplexity nor a task was measured for this card."
    dense = outcome.base is not None and not outcome.parent
    missing = f" The dense model, {code_span(outcome.base)}, was not measured." if dense else ""
    return "\n\n".join(
        [*parts, f"Perplexity is exp of the mean loss per token over windows that do not overlap.{missing} {RECORDED}"]
    )


def _benefit(outcome: Outcome) -> str:
    """The table of what was measured of speed, memory and disk; empty where nothing was."""
    return "\n\n".join(
        f"{prose_markdown(caption)} {RECORDED}\n\n{Table(header, rows).markdown()}"
        for _, caption, header, rows in benefits([outcome])
    )


def _note(facts: Mapping[str, Any], made: str, revision: str | None) -> str:
    parts = ["Run it beside `dsa_config.json`." if "dsa_config.json" in made else ""]
    if not made:
        parts.append("How the zeros came about is not known.")
    facts = _calibrated(facts)
    source = calibration_source(facts)
    if several := mixture(source):
        local = ", ".join(code_span(one) for one in several if dataset_id(one) is None)
        parts.append(f"Of the calibration data, {local} is not part of this repository." if local else "")
    elif facts.get("calibration") and not names_data(source):
        named = f" ({inline_markdown(source)})" if source else ""
        parts.append(f"The calibration data{named} were given in Python and have no name.")
    elif source and dataset_id(source) is None:
        parts.append(f"{code_span(source)} is a local file that is not part of this repository.")
    if not revision:
        parts.append("The base model's revision is not known.")
    return " ".join(part for part in parts if part)


def _settings(outcome: Outcome) -> str:
    """Every setting that had a say, and what calibration read, as a table; empty where nothing says."""
    known = _calibrated(outcome.facts).get("calibration") or {}
    data = [(f"calibration {name}", value) for name, value in known.items()]
    cut = {} if outcome.is_only_cut else cut_settings(outcome)
    rows = [*settings(outcome).items(), *data, *((f"cut: {name}", value) for name, value in cut.items())]
    return _facts_table(rows) if rows else ""


def _recovery(recovery: Mapping[str, Any]) -> dict[str, str]:
    """Command and settings of a training by `recover`; empty of another."""
    if recovery.get("kind") != "recover":
        return {}
    data = [
        (f"text {name}", value)
        for name, value in (recovery.get("data") or {}).items()
        if not isinstance(value, str) or last_part(value) == value  # a path is of no use to others
    ]
    return {
        "command": code_block(recover_command(recovery), "bash"),
        "settings": _facts_table([*training_settings(recovery).items(), *data]),
    }


def _facts_table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values as a table, of an allocation its name."""
    lines = ["| setting | value |", "| --- | --- |"]
    for name, value in rows:
        known = value.get("name", "given") if isinstance(value, Mapping) else value
        known = ", ".join(map(str, known)) if isinstance(known, list) else known
        if known not in (None, ""):
            lines.append(f"| {table_cell(inline_markdown(name))} | {table_cell(code_span(str(known)))} |")
    return "\n".join(lines)
