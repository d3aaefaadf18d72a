"""The model card of a pruned model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration import DSAConfig
from .installation import how_to_install
from .outcome import Outcome
from .provenance import command, dataset_id, last_part, names_data, papers, without_places
from .tables import Table, block_table, compared, describe_text, limits, percent, text_of


# The Hub knows finetune, adapter, merge and quantized. Pruned weights are the base model's own, compressed with loss.
RELATION = "quantized"
# Ending of the architecture's name -> the class that loads it, and what the Hub calls its task.
LOADERS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}


def model_card(
    outcome: Outcome,
    repo_id: str,
    model_config: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    plots: Mapping[str, str] | None = None,
    tokenizer: bool = True,
) -> ModelCard:
    """The card of `outcome`, with nothing in it that says where it was made.

    Args:
        outcome: of a pruned model.
        repo_id: where it will be.
        model_config: the content of the model's `config.json`.
        base: what the base model's card says of "license", "license_name", "license_link" and "language".
        plots: "allocation" and "heatmap" -> path in the repository.
        tokenizer: whether one lies beside the model.
    """
    facts = without_places(outcome.facts)
    config = DSAConfig.from_dict(facts["config"])
    base_id, revision = base_repository(facts)
    loader, task = _loader(model_config)
    name = repo_id.rpartition("/")[2]
    evaluations = [{**row, "dataset": last_part(row["dataset"])} for row in outcome.evaluations]
    calibration = facts.get("calibration") or {}
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=task,
        base_model=base_id,
        base_model_relation=RELATION if base_id else None,
        tags=["optimum-dsa", "pruned", "sparse", config.method, *_tags(facts["allocation"]["name"])],
        datasets=[found] if (found := dataset_id(calibration.get("source", ""))) else None,
        eval_results=[_eval_result(row) for row in evaluations] or None,
        **{key: value for key, value in (base or {}).items() if value},
    )
    achieved, recipe = outcome.achieved, config.recipe
    blocks = block_table(compared([replace(outcome, name="removed")]))
    made = command(facts)
    return ModelCard.from_template(
        data,
        template_str=files("optimum_dsa").joinpath("templates/model_card.md").read_text(encoding="utf-8"),
        name=name,
        repo_id=repo_id,
        base_link=f"[{base_id}](https://huggingface.co/{base_id})" if base_id else _local_name(facts),
        sparsity=percent(achieved["sparsity"]),
        removed=f"{achieved['removed']:,}",
        prunable=f"{achieved['prunable']:,}",
        overall=percent(achieved["sparsity_of_all_parameters"]),
        method=config.method,
        allocation=facts["allocation"]["name"],
        pattern=recipe.pattern,
        compressed=outcome.compressed,
        install=how_to_install(),
        loader=loader,
        tokenizer=tokenizer,
        plots=plots,
        results=_results(evaluations),
        training=_training(outcome.training),
        limits=limits(outcome),
        command=made,
        note=_note(calibration, made, revision),
        settings=[("metric", recipe.metric), ("update", recipe.update), *_settings(facts["config"], calibration)],
        blocks=blocks.markdown(),
        versions=Table(["package", "version"], [*map(list, (facts.get("versions") or {}).items())]).markdown(),
        papers=papers(facts["config"]),
    )


def _training(recovery: Mapping[str, Any]) -> str:
    """What is known of training after pruning, or during it, in words."""
    if not recovery:
        return ""
    if recovery.get("kind") != "recover":
        return f"It was trained with `DSACallback`, up to step {recovery.get('step')}."
    asked, perplexity = recovery["config"], recovery["perplexity"]
    return (
        f"After pruning it was trained for {recovery['steps']} steps (`{asked['method']}`), with every zero kept: "
        f"perplexity on validation text {perplexity['before']:.3f} before and {perplexity['after']:.3f} after."
    )


def _local_name(facts: Mapping[str, Any]) -> str | None:
    name = (facts.get("base_model") or {}).get("name")
    return f"`{name}`" if name else None


def base_repository(facts: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Hub id and revision of the base model; `None` for a local folder, whose name may mean another model there."""
    base = facts.get("base_model") or {}
    name, revision = base.get("name"), base.get("revision")
    on_hub = isinstance(name, str) and (revision or re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    return (name, revision) if on_hub else (None, None)


def _loader(model_config: Mapping[str, Any]) -> tuple[str, str | None]:
    names = model_config.get("architectures") or [""]
    return next((row for ending, row in LOADERS.items() if names[0].endswith(ending)), ("AutoModel", None))


def _tags(allocation: str) -> list[str]:
    """The allocation as a tag, where it has a plain name."""
    return [f"{allocation}-allocation"] if re.fullmatch(r"[a-z_]+", allocation) else []


def _eval_result(row: Mapping[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_id(row["dataset"]) or re.sub(r"[^\w.-]", "-", row["dataset"]),
        dataset_name=describe_text(text_of(row)),
        metric_type="perplexity",
        metric_value=round(row["perplexity"], 4),
    )


def _results(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "No perplexity was measured for this card."
    rows = [[describe_text(text_of(row)), f"{row['perplexity']:.3f}"] for row in evaluations]
    table = Table(["text", "perplexity"], rows).markdown()
    return (
        f"{table}\n\nPerplexity is exp of the mean loss per token over windows that do not overlap; lower is better."
    )


def _note(calibration: Mapping[str, Any], made: str, revision: str | None) -> str:
    parts = ["Run it beside `dsa_config.json`." if "dsa_config.json" in made else ""]
    if calibration and not names_data(calibration["source"]):
        parts.append(f"The calibration data ({calibration['source']}) were given in Python and have no name.")
    elif calibration and dataset_id(calibration["source"]) is None:
        parts.append(f"`{calibration['source']}` is a local file that is not part of this repository.")
    if not revision:
        parts.append("The base model's revision is not known.")
    return " ".join(part for part in parts if part)


def _settings(config: Mapping[str, Any], calibration: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every field of the config, and what calibration read."""
    rows = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            value = value.get("name", "given")
        rows.append((name, ", ".join(value) if isinstance(value, list) else value))
    rows += [(f"calibration {name}", value) for name, value in calibration.items()]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]
