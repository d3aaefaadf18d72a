"""What lies in the folder of a pruned model or of a search, read back to be shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .allocation import Allocation
from .configuration import CONFIG_NAME
from .search.trace import SearchTrace


LARGEST_EVALUATION = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """A pruned model or a search, as its folder tells it; `Outcome.read` makes one.

    Attributes:
        name (`str`): the folder's.
        allocation (`Allocation`, *optional*): of the model, or of the search's winner; `None` while a search runs.
        baselines (`Mapping[str, Allocation]`): others on the same model, such as "uniform" and "owl".
        facts (`Mapping[str, Any]`): the content of `dsa_config.json` or `search.json`.
        trace (`SearchTrace`, *optional*): of a search.
        evaluations (`Sequence[Mapping[str, Any]]`): what `optimum-cli dsa evaluate --json` printed.
        bytes (`int`, *optional*): of the weight files.
    """

    name: str
    allocation: Allocation | None
    baselines: Mapping[str, Allocation] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    trace: SearchTrace | None = None
    evaluations: Sequence[Mapping[str, Any]] = ()
    bytes: int | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Outcome:
        """What is in `folder`.

        Raises:
            FileNotFoundError: it holds neither a pruned model nor a search.
            ValueError: a file in it cannot be read.
        """
        path = Path(folder)
        name = path.resolve().name
        if (path / CONFIG_NAME).is_file():
            facts = _json(path / CONFIG_NAME)
            if "allocation" not in facts:
                raise ValueError(f"{path / CONFIG_NAME} is a configuration; no pruned model lies beside it.")
            allocation = Allocation.load(path / CONFIG_NAME)
            weights = [file.stat().st_size for file in path.glob("*.safetensors")]
            uniform = {"uniform": uniform_like(allocation)}
            return cls(name, allocation, uniform, facts, evaluations=_evaluations(path), bytes=sum(weights) or None)
        trace = SearchTrace.load(path / "trace.jsonl") if (path / "trace.jsonl").is_file() else None
        if (path / "search.json").is_file():
            facts = _json(path / "search.json")
            allocation = Allocation.load(path / "allocation.json")
            baselines = {name: Allocation.from_dict(data) for name, data in facts.get("baselines", {}).items()}
            return cls(name, allocation, {"uniform": uniform_like(allocation), **baselines}, facts, trace)
        if trace is None:
            raise FileNotFoundError(
                f"{path} holds neither {CONFIG_NAME} nor a search (search.json, trace.jsonl); give the folder of a "
                "pruned model or of a search."
            )
        return cls(name, None, facts={"config": trace.settings.get("config")}, trace=trace)

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, as it was written."""
        return self.facts.get("config") or {}

    @property
    def achieved(self) -> Mapping[str, Any]:
        """Sparsity and counts of a pruned model; empty for a search."""
        return self.facts.get("achieved") or {}

    @property
    def perplexity(self) -> float | None:
        """Of the first evaluation."""
        return self.evaluations[0]["perplexity"] if self.evaluations else None


def read_all(folders: Iterable[str | Path]) -> list[Outcome]:
    """The outcomes in several folders; where two have one name, the later one's gets a number."""
    outcomes: list[Outcome] = []
    for folder in folders:
        found = Outcome.read(folder)
        taken, number, name = {outcome.name for outcome in outcomes}, 2, found.name
        while name in taken:
            name, number = f"{found.name} ({number})", number + 1
        outcomes.append(replace(found, name=name))
    return outcomes


def uniform_like(allocation: Allocation) -> Allocation:
    """The same units and mean sparsity, all units alike."""
    shares = allocation.sparsity.values()
    mean = allocation.overall if any(allocation.sizes.values()) else sum(shares) / max(len(shares), 1)
    return Allocation(dict.fromkeys(allocation.sizes, mean), dict(allocation.sizes), "uniform")


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected an object.")
    return data


def _evaluations(folder: Path) -> tuple[dict[str, Any], ...]:
    """The JSON files in `folder` that `evaluate --json` wrote, by name of file."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size > LARGEST_EVALUATION:
            continue
        try:
            data = _json(path)
        except ValueError:
            continue
        value = data.get("perplexity")
        if isinstance(value, (int, float)) and isinstance(data.get("dataset"), str):
            found.append(data)
    return tuple(found)
