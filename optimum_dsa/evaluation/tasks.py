"""Zero-shot and other tasks, measured by lm-eval (EleutherAI's harness), on a model in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..common.installation import how_to_install
from ..common.registry import UnknownNameError, near
from ..model.inputs import KINDS, default_length, kind_of


# The zero-shot tasks of the DSA paper.
ZERO_SHOT = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval has, and its `TaskManager` that makes them; `find_tasks` gives them."""

    names: tuple[str, ...]
    manager: Any


def find_tasks(tasks: Sequence[str], include: str | Path | None = None) -> Tasks:
    """The tasks by these names, or in these YAML files; needs no model, and so comes before one is loaded.

    Args:
        tasks (`Sequence[str]`): names of lm-eval's tasks or groups, or paths of YAML files that describe one.
        include (`str | Path`, *optional*): a folder of further YAML files, whose tasks can be named.

    Raises:
        ValueError: lm-eval is not installed, or there is no task at all.
        UnknownNameError: a task that lm-eval does not know.
    """
    try:
        from lm_eval import tasks as known
    except ImportError as error:
        raise ValueError(f"Tasks are measured by lm-eval: {how_to_install('eval')} ({error}).") from None
    names, folders = task_names(tasks)
    if not names:
        raise ValueError("No task is named; give lm-eval's names, or YAML files.")
    if include is not None and not Path(include).is_dir():
        raise FileNotFoundError(f"No such folder of tasks: {str(include)!r}.")
    folders += [str(Path(include).resolve())] if include is not None else []
    # lm-eval's own descriptions are read, which takes seconds, only where a task is named that is not in a folder
    manager = known.TaskManager(include_path=folders or None, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = known.TaskManager(include_path=folders or None)
    for name in names:
        if name not in manager.all_tasks:
            raise UnknownNameError(f"lm-eval has no task {name!r}.{near(name, manager.all_tasks)}")
    return Tasks(tuple(names), manager)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] | Tasks,
    *,
    include: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    sequence_length: int | None = None,
    bos: bool | None = None,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Task -> metric -> `{"value", "error"}`, the error being lm-eval's standard error, `None` where it gives none.

    Args:
        model (`nn.Module`): a causal language model, or a sequence-to-sequence one.
        tokenizer (`Any`): its tokenizer.
        tasks (`Sequence[str] | Tasks`): names of lm-eval's tasks or groups, or paths of YAML files that describe one;
            or what `find_tasks` gave.
        include (`str | Path`, *optional*): a folder of further YAML files, whose tasks can be named.
        num_fewshot (`int`, *optional*): examples in front of each question; by default the task's own number.
        limit (`int`, *optional*): questions per task; by default all.
        sequence_length (`int`, *optional*): longest input; by default the model's, at most 2048.
        bos (`bool`, *optional*): whether inputs start with the beginning-of-sequence token; by default as lm-eval
            does, which asks the tokenizer.

    Raises:
        ValueError: lm-eval is not installed, or there is no tokenizer.
        UnknownNameError: a task that lm-eval does not know.
    """
    if tokenizer is None:
        raise ValueError("Tasks are texts: they need the model's tokenizer.")
    if (kind := kind_of(model)) not in ("causal", "sequence-to-sequence"):
        raise ValueError(f"{type(model).__name__} {KINDS[kind]}, and lm-eval's tasks are for models that write text.")
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=sequence_length or default_length(model),
        device=str(model.device),
        **({} if bos is None else {"add_bos_token": bos}),
    )
    measured = simple_evaluate(
        model=wrapped,
        tasks=list(found.names),
        task_manager=found.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
    )
    return tidy(measured["results"])


def task_names(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of tasks, and the folders of those that were given as YAML files."""
    names, folders = [], []
    for task in tasks:
        path = Path(task)
        if path.suffix not in (".yaml", ".yml"):
            names.append(task)
            continue
        named = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if named is None:
            raise ValueError(f"{task} describes no task: expected a line such as 'task: my_task'.")
        names.append(named[1])
        folders.append(str(path.resolve().parent))
    return names, folders


def tidy(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """lm-eval's `results`, with each value beside its standard error.

    Keys such as "acc,none" and "acc_stderr,none" become "acc"; another filter than "none" stays in the name.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, entries in results.items():
        for key, value in entries.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = entries.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            found.setdefault(task, {})[name] = {
                "value": float(value),
                "error": float(error) if isinstance(error, (int, float)) else None,
            }
    return found
