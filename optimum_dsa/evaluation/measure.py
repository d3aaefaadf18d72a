"""`measure`: perplexity, tasks and zeros of one model, with the protocol beside every number."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.frame import Frame, frame_of
from ..common.hub_file import model_name
from ..common.token_rows import as_tensors, is_inputs, token_row
from ..common.windows import NoTokenizerError
from ..data import Reading, check_cut, describe, fingerprint, load_tokens, starts_with_bos
from ..model.adapters import inner_model
from ..model.architecture import find_architecture
from ..model.examples import PREDICTS, check_predicts_tokens
from ..model.inputs import check_length, default_length, kind_of
from ..packed.pack_model import seen_dense
from ..pruning.report import PruningReport
from ..pruning.zeros import count_zeros
from .harness import fitting
from .measurement import Measurement, Protocol, TaskProtocol
from .perplexity import mean_perplexity, window_losses
from .tasks import Tasks, evaluate_tasks, find_tasks


def measure(
    model: nn.Module,
    text: Any = None,
    tasks: Sequence[str] | Tasks = (),
    *,
    tokenizer: Any = None,
    report: PruningReport | None = None,
    name: str | None = None,
    windows: str = "each",
    bos: bool | None = None,
    sequence_length: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    split: str | None = None,
    text_column: str = "text",
    subset: str | None = None,
    include: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
    keep: bool = False,
) -> Measurement:
    """Perplexity on a text, results on tasks of lm-eval, and zeros of a model in memory.

    [`DSAPruner.measure`] does it for a pruner's model, which may come from a folder or the Hub.

    Args:
        model (`nn.Module`): a language model: causal, masked or sequence-to-sequence, each measured by what it
            predicts, see [`perplexity`].
        text (`Any`, *optional*): texts, conversations, a file, a dataset or its name, or token ids (samples, length).
        tasks (`Sequence[str]`): names of lm-eval's tasks, or YAML files; or what `find_tasks` gave.
        tokenizer (`Any`, *optional*): the model's; needed for texts and tasks, and by masked models.
        report (`PruningReport`, *optional*): how the model was pruned, which says where zeros are counted; by default
            in all matrices of the blocks.
        name (`str`, *optional*): what the result calls the model; by default the last part of its folder.
        windows (`str`, defaults to `"each"`): `"each"` window of the text starts with BOS where the tokenizer adds it;
            `"paper"` cuts the whole text as the code behind published figures does, see `load_tokens`.
        bos (`bool`, *optional*): whether there is a BOS at all; by default where the tokenizer adds it.
        sequence_length (`int`, *optional*): tokens per window; by default as long as the model allows, at most 2048.
        num_samples (`int`, *optional*): so many windows, drawn by `seed`; by default all.
        split (`str`, *optional*): of a named dataset, by default `"test"`; or rows of it, as in `"test[:50]"`.
        text_column (`str`, defaults to `"text"`): the column of a dataset that holds the text or the conversation.
        subset (`str`, *optional*): the configuration of a dataset that has several.
        include, num_fewshot, limit, keep: of tasks, see `evaluate_tasks`.
        batch_size (`int | str`, defaults to 8): windows per forward pass, or "auto": as many as fit. It does not
            change the result.

    Raises:
        ValueError: nothing to measure, or text and model do not fit.
    """
    text = _as_rows(as_tensors(text))
    check_asked(text, tasks, windows, num_samples, sequence_length, batch_size, limit)
    place = getattr(model.config, "name_or_path", "")
    called = name or (model_name(place) if place else type(model).__name__)
    without = f"{called} has no tokenizer, so text cannot be read; name the one it was trained with."
    if tokenizer is None and tasks:
        raise ValueError(without)
    if text is not None:
        check_predicts_tokens(model, tokenizer)
    length = sequence_length or default_length(model)
    check_length(length, model)
    found: dict[str, Any] = {}
    if text is not None:
        cut = {"sequence_length": length, "windows": windows, "bos": bos, "num_samples": num_samples, "seed": seed}
        cut["keeps_rows"] = sequence_length is None
        try:
            at_once, reading = fitting(batch_size, model, length), Reading(text_column, split, subset, "test")
            found |= _on_text(model, tokenizer, text, at_once, reading, cut)
        except NoTokenizerError:  # of rows of token ids none is asked for, and what a source holds its rows tell
            raise ValueError(without) from None
    if tasks:
        options = {"sequence_length": length, "num_fewshot": num_fewshot, "limit": limit, "bos": bos}
        tasks = tasks if isinstance(tasks, Tasks) else find_tasks(tasks, include)
        found["tasks"] = evaluate_tasks(model, tokenizer, tasks, batch_size=batch_size, keep=keep, **options)
        found["groups"] = {name: members for name, members in tasks.groups.items() if name in found["tasks"]}
        release = importlib.metadata.version("lm_eval")
        found["task_protocol"] = TaskProtocol(**options, dtype=_dtype(model), lm_eval=release)
    zeros, size = _count(model, report)
    return Measurement(called, zeros / size, size, **found)


def check_asked(
    text: Any,
    tasks: Any,
    windows: str = "each",
    num_samples: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | str = 8,
    limit: int | None = None,
) -> None:
    """Raise what is wrong with arguments of [`measure`] whatever the model is; to be called before it is loaded."""
    if text is None and not tasks:
        raise ValueError("Say what to measure: a text, tasks, or both.")
    numbers = {
        "sequence_length": sequence_length,
        "num_samples": num_samples,
        "batch_size": None if batch_size == "auto" else batch_size,
        "limit": limit,
    }
    for name, value in numbers.items():
        least = 2 if name == "sequence_length" else 1
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}.")
    check_cut(windows, num_samples)


def _on_text(
    model: nn.Module, tokenizer: Any, text: Any, batch_size: int, reading: Reading, options: dict[str, Any]
) -> dict[str, Any]:
    """Perplexity, its error, losses and protocol: entries of a `Measurement`."""
    if isinstance(text, Tensor):
        tokens, source, cut, bos = text, "tokens", None, None  # how tokens were made, they do not tell
    else:
        tokens, source = _windows(model, tokenizer, text, reading, **options), describe(text)
        made = reading.passed.token_rows
        cut, bos = (None, None) if made else (options["windows"], starts_with_bos(tokenizer, options["bos"]))
    losses = window_losses(model, tokens, batch_size, tokenizer)
    value, error = mean_perplexity(losses)
    of = PREDICTS[kind_of(model)]
    protocol = Protocol(source, *tokens.shape, cut, bos, _dtype(model), fingerprint(tokens), of)
    return {"perplexity": value, "perplexity_error": error, "losses": tuple(losses.tolist()), "protocol": protocol}


def _windows(model: nn.Module, tokenizer: Any, text: Any, reading: Reading, **options) -> Tensor:
    """Windows of the text, (samples, length) int64, each in the frame of a model that is no causal one."""
    framed = kind_of(model) != "causal" and options["bos"] is None and options["windows"] == "each"
    framed = framed and tokenizer is not None
    frame = frame_of(tokenizer) if framed else Frame()
    if frame:
        options |= {"sequence_length": options["sequence_length"] - len(frame), "bos": False}
    tokens = load_tokens(text, tokenizer, **options, reading=reading)
    # Rows of token ids are what somebody has made, frame and all.
    return tokens if reading.passed.token_rows else frame.around(tokens)


def _as_rows(text: Any) -> Any:
    """Of what a tokenizer returned, the rows of token ids, (samples, length), without padding; else `text` itself."""
    if not isinstance(text, Mapping) or "input_ids" not in text or not is_inputs(text):
        return text
    ids, mask = text["input_ids"], text.get("attention_mask")
    return ids if mask is None or bool(mask.all()) else [token_row(*row) for row in zip(ids, mask)]


def _dtype(model: nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")


def _count(model: nn.Module, report: PruningReport | None) -> tuple[int, int]:
    """Zeros in the prunable weights, and how many these are: of a pruned model what was pruned, else all of blocks."""
    model, named = inner_model(model), {}
    if report is not None:
        asked = report.config
        named = {"blocks": asked.blocks, "exclude": asked.exclude, "include": asked.include}
    with seen_dense(model):
        architecture = find_architecture(model, **named, skip_unprunable=True)
        zeros = count_zeros(model, architecture)
    return sum(zeros.values()), sum(weight.size for weight in architecture.weights)
