"""`measure`: perplexity, tasks and zeros of one model, with the protocol beside every number."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data import check_cut, check_source, default_length, describe, fingerprint, load_tokens, starts_with_bos
from ..model.adapters import inner_model
from ..model.architecture import find_architecture
from ..pruning.report import PruningReport
from ..pruning.zeros import count_zeros
from .measurement import Measurement, Protocol, TaskProtocol
from .perplexity import mean_perplexity, window_losses
from .tasks import Tasks, evaluate_tasks, find_tasks


def measure(
    model: Any,
    text: Any = None,
    tasks: Sequence[str] | Tasks = (),
    *,
    tokenizer: Any = None,
    name: str | None = None,
    windows: str = "each",
    bos: bool | None = None,
    sequence_length: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    split: str | None = "test",
    text_column: str = "text",
    include: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    **loading: Any,
) -> Measurement:
    """Perplexity on a text, results on tasks of lm-eval, and zeros of one model.

    ```python
    from optimum_dsa import measure

    print(measure("qwen3-60", "wikitext2", windows="paper", sequence_length=2048))
    ```

    Args:
        model (`Any`): a folder or Hub id, a `DSAPruner`, or a model.
        text (`Any`, *optional*): texts, a file, a dataset or its name, or a LongTensor (samples, length).
        tasks (`Sequence[str]`): names of lm-eval's tasks, or YAML files; or what `find_tasks` gave.
        tokenizer (`Any`, *optional*): a tokenizer or where to load one from; by default the model's own.
        name (`str`, *optional*): what the result calls the model; by default the last part of its folder.
        windows (`str`, defaults to `"each"`): `"each"` window of the text starts with BOS where the tokenizer adds it;
            `"paper"` cuts the whole text as the code behind published figures does, see `load_tokens`.
        bos (`bool`, *optional*): whether there is a BOS at all; by default where the tokenizer adds it.
        sequence_length (`int`, *optional*): tokens per window; by default as long as the model allows, at most 2048.
        num_samples (`int`, *optional*): so many windows, drawn by `seed`; by default all.
        split (`str`, defaults to `"test"`): of a named dataset.
        text_column (`str`, defaults to `"text"`): the column of a dataset that holds the text.
        include, num_fewshot, limit: of tasks, see `evaluate_tasks`.
        batch_size (`int`, defaults to 8): windows per forward pass. It does not change the result.
        loading (`dict`): go to the model's `from_pretrained` (`dtype`, `device_map`, `revision`, ...).

    Raises:
        ValueError: nothing to measure, or text and model do not fit. What can be known without the model is raised
            before it is loaded.
    """
    has_tasks = isinstance(tasks, Tasks) or bool(tasks)
    if text is None and not has_tasks:
        raise ValueError("Say what to measure: a text, tasks, or both.")
    _check(sequence_length=sequence_length, num_samples=num_samples, batch_size=batch_size, limit=limit)
    check_cut(windows, num_samples)
    if text is not None and not isinstance(text, Tensor):
        check_source(text, text_column, split)
    if has_tasks and not isinstance(tasks, Tasks):
        tasks = find_tasks(tasks, include)
    called = name or _name(model)
    pruner = _opened(model, tokenizer, loading)
    if pruner.tokenizer is None and (has_tasks or not isinstance(text, Tensor)):
        raise ValueError(f"{called} has no tokenizer, so text cannot be read; name the one it was trained with.")
    length = sequence_length or default_length(pruner.model)
    found: dict[str, Any] = {}
    if text is not None:
        cut = {"sequence_length": length, "windows": windows, "bos": bos, "num_samples": num_samples, "seed": seed}
        found |= _on_text(pruner, text, batch_size, {**cut, "split": split, "text_column": text_column})
    if has_tasks:
        options = {"sequence_length": length, "num_fewshot": num_fewshot, "limit": limit, "bos": bos}
        found["tasks"] = evaluate_tasks(pruner.model, pruner.tokenizer, tasks, batch_size=batch_size, **options)
        release = importlib.metadata.version("lm_eval")
        found["task_protocol"] = TaskProtocol(**options, dtype=_dtype(pruner.model), lm_eval=release)
    zeros, size = _count(pruner.model, pruner.report)
    return Measurement(called, zeros / size, size, **found)


def _on_text(pruner: Any, text: Any, batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Perplexity, its error, losses and protocol: entries of a `Measurement`."""
    if isinstance(text, Tensor):
        tokens, cut, bos = text, None, None  # how tokens were made, they do not tell
    else:
        tokens = load_tokens(text, pruner.tokenizer, **options)
        cut, bos = options["windows"], starts_with_bos(pruner.tokenizer, options["bos"])
    losses = window_losses(pruner.model, tokens, batch_size)
    value, error = mean_perplexity(losses)
    source = "tokens" if isinstance(text, Tensor) else describe(text)
    protocol = Protocol(source, *tokens.shape, cut, bos, _dtype(pruner.model), fingerprint(tokens))
    return {"perplexity": value, "perplexity_error": error, "losses": tuple(losses.tolist()), "protocol": protocol}


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        least = 2 if name == "sequence_length" else 1
        if value is not None and not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}.")


def _opened(model: Any, tokenizer: Any, loading: dict[str, Any]) -> Any:
    """A `DSAPruner` of the model: it has the tokenizer, and what is known of its pruning."""
    # the public door, and only now: measuring knows models in memory, and loading is for those who name a folder
    from .. import DSAPruner

    if not isinstance(model, DSAPruner):
        return DSAPruner.from_pretrained(model, tokenizer, **loading)
    if loading:
        raise ValueError(f"A loaded model takes no loading options, got {', '.join(loading)}.")
    if tokenizer is None:
        return model
    other = DSAPruner.from_pretrained(model.model, tokenizer)
    other.report = model.report
    return other


def _name(model: Any) -> str:
    if isinstance(model, (str, Path)):
        return describe(model)
    inner = model if isinstance(model, nn.Module) else model.model
    path = getattr(getattr(inner, "config", None), "name_or_path", "")
    return describe(path) if path else type(inner).__name__


def _dtype(model: nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")


def _count(model: nn.Module, report: PruningReport | None) -> tuple[int, int]:
    """Zeros in the prunable weights, and how many these are: of a pruned model what was pruned, else all of blocks."""
    model = inner_model(model)
    if report is None:
        architecture = find_architecture(model, skip_unprunable=True)
    else:
        asked = report.config
        architecture = find_architecture(model, asked.blocks, asked.exclude, asked.include, skip_unprunable=True)
    zeros = count_zeros(model, architecture)
    return sum(zeros.values()), sum(weight.size for weight in architecture.weights)
