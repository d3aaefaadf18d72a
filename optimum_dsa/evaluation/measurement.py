"""What was measured of one model, and by which protocol, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..common.values import is_real, is_whole


@dataclass(frozen=True)
class Protocol:
    """On what a perplexity was measured. Two perplexities can be compared where this is equal, and only there.

    Attributes:
        dataset (`str`): name of the text; of a file its last part.
        windows (`int`): how many, without overlap.
        sequence_length (`int`): tokens of each, a BOS included.
        cut (`str`): `"each"` window starts with BOS where the tokenizer adds it, or `"paper"`: one BOS before the
            whole text, rows joined by two line breaks, as in the code behind published figures.
        bos (`bool`): whether there is a BOS at all.
        dtype (`str`): of the model.
        fingerprint (`str`): of the windows' tokens: another text or tokenizer has another one.
        predicted (`str`, *optional*): what was predicted, where it is not every next token.
    """

    dataset: str
    windows: int | None = None
    sequence_length: int | None = None
    cut: str | None = None
    bos: bool | None = None
    dtype: str | None = None
    fingerprint: str | None = None
    predicted: str | None = None

    def __str__(self) -> str:
        parts = [self.dataset]
        if self.windows is not None:
            parts.append(f"{self.windows} windows of {self.sequence_length} tokens")
        if self.bos is not None:
            named = {"each": "BOS before each", "paper": "one BOS before the whole text"}
            parts.append(named.get(self.cut, "BOS") if self.bos else "no BOS")
        parts += ["cut as in papers"] if self.cut == "paper" else []
        parts += [f"of {self.predicted}"] if self.predicted else []
        return ", ".join([*parts, *([self.dtype] if self.dtype else [])])


@dataclass(frozen=True)
class TaskProtocol:
    """How tasks were measured; as with [`Protocol`], only equal ones are comparable.

    Attributes:
        num_fewshot (`int`, *optional*): examples in front of each question; `None` where each task has its own number.
        limit (`int`, *optional*): questions per task; `None` for all.
        sequence_length (`int`, *optional*): longest input in tokens.
        bos (`bool`, *optional*): asked for or forbidden; `None` is as lm-eval does, which asks the tokenizer.
        dtype (`str`): of the model.
        lm_eval (`str`): the release of lm-eval.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    sequence_length: int | None = None
    bos: bool | None = None
    dtype: str | None = None
    lm_eval: str | None = None

    def __str__(self) -> str:
        shots = "each task's own examples" if self.num_fewshot is None else f"{self.num_fewshot} examples in front"
        questions = "all questions" if self.limit is None else f"the first {self.limit} questions"
        length = [] if self.sequence_length is None else [f"at most {self.sequence_length} tokens"]
        asked = [] if self.bos is None else ["with BOS" if self.bos else "no BOS"]
        return ", ".join([questions, shots, *length, *asked, *([self.dtype] if self.dtype else [])])


@dataclass(frozen=True)
class Measurement:
    """What [`measure`] found of one model; `print` shows it line by line.

    Attributes:
        model (`str`): its folder or Hub id, or what it was called.
        sparsity (`float`): share of zeros in the prunable weights.
        size (`int`): number of prunable weights: of a pruned model those that its `dsa_config.json` speaks of.
        perplexity (`float`, *optional*): with its standard error `perplexity_error`; `None` without text.
        protocol (`Protocol`, *optional*): what it was measured on.
        losses (`tuple[float, ...]`): mean loss per predicted token of every window, for differences to other models.
        tasks (`Mapping[str, Mapping]`): task -> metric -> `{"value", "error"}`.
        task_protocol (`TaskProtocol`, *optional*): how tasks were measured.
        groups (`Mapping[str, Sequence[str]]`): of the tasks, those that are groups -> the tasks that they consist of.
    """

    model: str
    sparsity: float
    size: int
    perplexity: float | None = None
    perplexity_error: float | None = None
    protocol: Protocol | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)
    tasks: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    task_protocol: TaskProtocol | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values on one level, those of the protocol among them; nothing of what was not measured."""
        data = asdict(self)
        text = data.pop("protocol") or {}
        data["losses"] = [round(loss, 5) for loss in self.losses]
        data["task_protocol"] = {k: v for k, v in (data["task_protocol"] or {}).items() if v is not None}
        # dataset, windows and sequence_length are where version 0.1 had them
        return {name: value for name, value in (data | text).items() if value not in (None, {}, [])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The measurement in `to_dict`'s form, or in that of version 0.1, which did not say how windows were cut.

        Raises:
            ValueError: it holds none, or values that a measurement cannot have.
        """
        text = {name: data[name] for name in _names(Protocol) if name in data}
        _check(data, {"model": str, "sparsity": float, "size": int})
        _check(data, {name: float for name in ("perplexity", "perplexity_error") if name in data})
        _check(data, {name: kind for name, kind in _TEXT.items() if name in data})
        losses, tasks, how = data.get("losses", []), data.get("tasks", {}), data.get("task_protocol", {})
        if not isinstance(losses, list) or not all(map(is_real, losses)):
            raise ValueError("losses is a list of numbers.")
        if not _are_tasks(tasks):
            raise ValueError("tasks is task -> metric -> value and error.")
        if not isinstance(how, Mapping):
            raise ValueError("task_protocol is an object.")
        if not _are_groups(groups := data.get("groups", {})):
            raise ValueError("groups is group -> names of tasks.")
        return cls(
            data["model"],
            data["sparsity"],
            data["size"],
            data.get("perplexity"),
            data.get("perplexity_error"),
            Protocol(**text) if "dataset" in text else None,
            tuple(losses),
            tasks,
            TaskProtocol(**{name: how[name] for name in _names(TaskProtocol) if name in how}) if tasks else None,
            {name: tuple(members) for name, members in groups.items()},
        )

    def __str__(self) -> str:
        lines = []
        if self.perplexity is not None:
            lines.append(f"perplexity  {with_error(self.perplexity, self.perplexity_error, 3)}  on {self.protocol}")
        for task, metrics in self.tasks.items():
            lines += [
                f"{task}  {metric} {with_error(found['value'], found['error'], 4)}"
                for metric, found in metrics.items()
            ]
        lines += [f"tasks       {self.task_protocol}"] if self.task_protocol else []
        lines.append(f"sparsity    {self.sparsity:.4f}  of {self.size:,} prunable weights")
        return "\n".join(lines)


_TEXT = {
    "dataset": str,
    "windows": int,
    "sequence_length": int,
    "cut": str,
    "bos": bool,
    "dtype": str,
    "fingerprint": str,
    "predicted": str,
}


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """A number and its standard error, "" where there is none."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _check(data: Mapping[str, Any], expected: Mapping[str, type]) -> None:
    """Raise `ValueError` unless the names are there, with values of these types."""
    for name, kind in expected.items():
        value = data.get(name)
        holds = is_real(value) if kind is float else is_whole(value) if kind is int else isinstance(value, kind)
        if not holds:
            raise ValueError(f"{name} is a {kind.__name__}, got {str(value)[:60]!r}.")


def _are_tasks(tasks: Any) -> bool:
    return isinstance(tasks, Mapping) and all(
        isinstance(metrics, Mapping)
        and all(
            isinstance(found, Mapping)
            and is_real(found.get("value"))
            and (found.get("error") is None or is_real(found["error"]))
            for found in metrics.values()
        )
        for metrics in tasks.values()
    )


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, Mapping) and all(
        isinstance(members, (list, tuple)) and all(isinstance(name, str) for name in members)
        for members in groups.values()
    )
