"""Zero-shot and other tasks, measured by lm-eval (EleutherAI's harness), on a model in memory."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..common.installation import how_to_install
from ..common.registry import UnknownNameError, near
from ..model.inputs import KINDS, default_length, kind_of
from .harness import beside, no_bars, no_repository, own_folder, requests_kept, wrapped


logger = logging.getLogger(__name__)

# The zero-shot tasks of the DSA paper; all of them and the mean of their accuracies have a name of their own.
ALL_SEVEN = "zero-shot"
ZERO_SHOT = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval has, and its `TaskManager` that makes them; `find_tasks` gives them.

    Attributes:
        names: of tasks, groups and tags.
        manager: lm-eval's.
        root: the folder that data are named from, where it is not the working directory.
    """

    names: tuple[str, ...]
    manager: Any
    root: Path | None = None

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """lm-eval's tasks and groups by name, with their data; made once, for all models.

        Raises:
            FileNotFoundError: there are no data, here or where lm-eval has them from.
        """
        from datasets.exceptions import DatasetsError

        with beside(self.root):
            try:
                return self.manager.load(list(self.names))
            except (OSError, DatasetsError) as error:
                raise FileNotFoundError(
                    f"The data of {', '.join(self.names)} are not to be had: {' '.join(str(error).split())[:300]}. "
                    "With no network, name a folder of tasks whose data are files: --tasks-path FOLDER."
                ) from None

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group -> the tasks that it consists of, those of groups in it as well."""
        return {name: tuple(task.task_name for task in one.get_all_tasks())
                for name, one in self.loaded["groups"].items()}  # fmt: skip

    @cached_property
    def kept(self) -> tempfile.TemporaryDirectory:
        """Where requests are kept from one model to the next."""
        return own_folder()


def find_tasks(tasks: Sequence[str], include: str | Path | None = None) -> Tasks:
    """The tasks by these names, or in these YAML files; needs no model, and so comes before one is loaded.

    Args:
        tasks (`Sequence[str]`): names of lm-eval's tasks or groups, or paths of YAML files that describe one;
            "zero-shot" is the seven tasks of the DSA paper and the mean of their accuracies.
        include (`str | Path`, *optional*): a folder of further YAML files, whose tasks can be named. Where it has
            `local_NAME` and no NAME, that is what NAME means. Data that its files name without a folder are looked
            for in the working directory, then in the folder, then in the folders around it.

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
    root = _data_root(manager, folders)
    asked = [_described(task, files[task], manager) if task in files else _local(task, manager) for task in tasks]
    seven = [_local(task, manager) for task in ZERO_SHOT] if ALL_SEVEN in asked else []
    plain = [*(name for name in asked if name != ALL_SEVEN), *seven]
    if not all(manager.match_tasks([name]) for name in [*plain, *_members(manager, plain)]):
        manager = known.TaskManager(include_path=[*folders] or None)
    if seven:
        mean = {"metric": "acc", "weight_by_size": False}
        group = {"group": ALL_SEVEN, "task": seven, "aggregate_metric_list": [mean]}
        manager.task_index[ALL_SEVEN] = known.manager.TaskIndex.entry_from_config(group)
    for name in sorted(_members(manager, asked, inline=False)):
        if not manager.match_tasks([name]):
            raise UnknownNameError(
                f"lm-eval has no task {name!r}, which a group names.{near(name, manager.all_tasks)}"
            )
    broken = {} if include is None else _broken(manager, Path(include).resolve())
    names: dict[str, None] = {}
    for name in asked:
        # a pattern, as in "arc_*", stands for several
        found = [name] if seven and name == ALL_SEVEN else manager.match_tasks([name])
        if not found:
            lost = "".join(f" {file} cannot be read: {why}." for file, why in broken.items())
            known = [*manager.all_tasks, ALL_SEVEN]
            where = "" if include is None else f", nor has {include}"
            raise UnknownNameError(f"lm-eval has no task {name!r}{where}.{near(name, known)}{lost}")
        names |= dict.fromkeys(found)
    for file, why in broken.items():
        logger.warning("%s cannot be read, and is no task: %s.", file, why)
    return Tasks(tuple(names), manager, root)


def _broken(manager: Any, folder: Path) -> dict[Path, str]:
    """Files of tasks in `folder` that cannot be read, which lm-eval passes over without a word -> why."""
    from lm_eval.tasks.manager import load_yaml

    known = {Path(entry.yaml_path).resolve() for entry in manager.task_index.values() if entry.yaml_path}
    found = {}
    for path in sorted(folder.glob("**/*.yaml")):
        if path.resolve() not in known:
            try:
                load_yaml(path, resolve_func=False)
            except Exception as error:  # noqa: BLE001 - a file, and what it includes, may break in any way
                found[path] = " ".join(str(error).split())[:300]
    return found


def _local(name: str, manager: Any) -> str:
    """The name of the copy of a task with local data, where a folder has one; else the name itself."""
    copy = f"local_{name}"
    return copy if not manager.match_tasks([name]) and manager.match_tasks([copy]) else name


def _data_root(manager: Any, folders: Iterable[str]) -> Path | None:
    """The folder from which the files of the tasks in `folders` are named; `None` where that is the working directory.

    lm-eval leaves it to the user to stand in the right place, which a folder of tasks cannot ask of several users.
    """
    configs = [entry.cfg or {} for entry in manager.task_index.values() if entry.yaml_path]
    named = [file for config in configs for file in _files_in((config.get("dataset_kwargs") or {}).get("data_files"))]
    around = [place for folder in folders for place in (Path(folder), *list(Path(folder).parents)[:2])]
    return next((place for place in around if _has_any(place, named)), None) if not _has_any(Path(), named) else None


def _files_in(value: Any) -> Iterator[str]:
    """Names of files without a place of their own in what a task's `data_files` say."""
    if isinstance(value, str) and "://" not in value and not Path(value).is_absolute():
        yield value
    elif isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _files_in(item)


def _has_any(place: Path, names: Iterable[str]) -> bool:
    return any((place / name).is_file() for name in names)


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
    batch_size: int | str = 8,
    sequence_length: int | None = None,
    bos: bool | None = None,
    keep: bool = False,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Task -> metric -> `{"value", "error"}`, the error being lm-eval's standard error, `None` where it gives none.

    Args:
        model (`nn.Module`): a causal language model, or a sequence-to-sequence one.
        tokenizer (`Any`): its tokenizer.
        tasks (`Sequence[str] | Tasks`): names of lm-eval's tasks or groups, or paths of YAML files that describe one;
            or what `find_tasks` gave. "zero-shot" is the seven tasks of the DSA paper, and their mean.
        include (`str | Path`, *optional*): a folder of further YAML files, whose tasks can be named.
        num_fewshot (`int`, *optional*): examples in front of each question; by default the task's own number.
        limit (`int`, *optional*): questions per task; by default all.
        batch_size (`int | str`, defaults to `8`): requests per forward pass, or "auto": as many as fit.
        sequence_length (`int`, *optional*): longest input; by default the model's, at most 2048.
        bos (`bool`, *optional*): whether inputs start with the beginning-of-sequence token; by default as lm-eval
            does, which asks the tokenizer.
        keep (`bool`, defaults to `False`): keep the requests that lm-eval makes of whole tasks for the next model that
            is given these `Tasks`.

    Raises:
        ValueError: lm-eval is not installed, or there is no tokenizer.
        UnknownNameError: a task that lm-eval does not know.
        FileNotFoundError: a task's data are not to be had.
    """
    if tokenizer is None:
        raise ValueError("Tasks are texts: they need the model's tokenizer.")
    if (kind := kind_of(model)) not in ("causal", "sequence-to-sequence"):
        raise ValueError(f"{type(model).__name__} {KINDS[kind]}, and lm-eval's tasks are for models that write text.")
    found = tasks if isinstance(tasks, Tasks) else find_tasks(tasks, include)
    from lm_eval import simple_evaluate

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loaded = SimpleNamespace(load=lambda _: found.loaded, task_index=found.manager.task_index)
    # of a part of a task, lm-eval would make all requests to keep them
    with no_bars(), no_repository(), requests_kept(found.kept.name if keep and limit is None else None) as keeping:
        measured = simple_evaluate(
            model=wrapped(model, tokenizer, batch_size, sequence_length or default_length(model), bos),
            tasks=list(found.names),
            task_manager=loaded,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            **keeping,
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
