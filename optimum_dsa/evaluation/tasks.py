"""Zero-shot and other tasks, measured by lm-eval (EleutherAI's harness), on a model in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.fences import has_device_map
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
    if not tasks:
        raise ValueError("No task is named; give lm-eval's names, or YAML files.")
    if include is not None and not Path(include).is_dir():
        raise FileNotFoundError(f"No such folder of tasks: {str(include)!r}.")
    files = {task: Path(task).resolve() for task in tasks if Path(task).suffix in (".yaml", ".yml")}
    folders = {str(path.parent): None for path in files.values()}
    folders |= {str(Path(include).resolve()): None} if include is not None else {}
    for task, path in files.items():
        if not path.is_file():
            raise FileNotFoundError(f"No such file of a task: {task!r}.")
    # lm-eval's own descriptions are read, which takes seconds, only where a task is named that is not in a folder
    manager = known.TaskManager(include_path=[*folders] or None, include_defaults=False)
    asked = [_described(task, files[task], manager) if task in files else task for task in tasks]
    if not all(manager.match_tasks([name]) for name in [*asked, *_members(manager, asked)]):
        manager = known.TaskManager(include_path=[*folders] or None)
    for name in sorted(_members(manager, asked, inline=False)):
        if not manager.match_tasks([name]):
            raise UnknownNameError(
                f"lm-eval has no task {name!r}, which a group names.{near(name, manager.all_tasks)}"
            )
    names: dict[str, None] = {}
    for name in asked:
        found = manager.match_tasks([name])  # a pattern, as in "arc_*", stands for several
        if not found:
            raise UnknownNameError(f"lm-eval has no task {name!r}.{near(name, manager.all_tasks)}")
        names |= dict.fromkeys(found)
    return Tasks(tuple(names), manager)


def _described(task: str, path: Path, manager: Any) -> str:
    """The name of the task or group that lm-eval finds in a YAML file, and in what that includes."""
    named = {Path(entry.yaml_path).resolve(): name for name, entry in manager.task_index.items() if entry.yaml_path}
    if path in named and isinstance(named[path], str):
        return named[path]
    if path.suffix == ".yml":
        raise ValueError(f"{task}: lm-eval reads files that end in .yaml; rename it.")
    from lm_eval.tasks.manager import TaskIndex

    try:
        found: Any = TaskIndex.entry_from_path(path)
    except Exception as error:  # noqa: BLE001 - a file, and what it includes, may break in any way
        raise ValueError(f"{task} describes no task: {' '.join(str(error).split())}") from None
    if found is None:
        raise ValueError(f"{task} describes no task: expected a line such as 'task: my_task' or 'group: my_group'.")
    raise ValueError(f"{task} describes {found.name!r}, and so does another file, which lm-eval takes; rename one.")


def _members(manager: Any, names: Sequence[str], inline: bool = True) -> set[str]:
    """The tasks and groups that groups among `names` consist of, by name, those of groups in them as well.

    With `inline` also those of objects, which may be described there and nowhere else.
    """
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        entry = manager.task_index.get(waiting.pop())
        new = set(_named((entry.cfg or {}).get("task"), inline)) - found if entry is not None and entry.cfg else set()
        found |= new
        waiting += new
    return found


def _named(value: Any, inline: bool = True) -> Iterator[str]:
    """Names in what stands under a group's "task": a list of names, or of objects with names of their own."""
    for item in value if isinstance(value, list) else ():
        inner = item.get("task") if isinstance(item, dict) else None
        if isinstance(item, str) or inline and isinstance(inner, str):
            yield item if isinstance(item, str) else inner
        yield from _named(inner, inline)


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
    # where the weights are on the disk, the model calls no device its own
    place = torch.device("cpu") if has_device_map(model) else model.device

    class Placed(HFLM):
        """lm-eval's wrapper, with inputs put where the model takes them."""

        device = property(lambda self: place)

    wrapped = Placed(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=sequence_length or default_length(model),
        device=str(place),
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
