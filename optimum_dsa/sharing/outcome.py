"""What lies in the folder of a pruned model or of a search, read back to be shown."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.description import contradictions, read_description
from ..checkpoint.encodings import ENCODINGS
from ..checkpoint.verify import Verification
from ..common.escaping import one_line
from ..common.files import read_json
from ..common.folder_files import own_file
from ..common.values import is_real, is_whole, short
from ..pruning.allocation import Allocation
from ..pruning.configuration import CONFIG_NAME
from ..search.trace import SearchTrace


logger = logging.getLogger(__name__)

_COUNTED = {"trials": int, "tokens": int, "baselines": Mapping}  # what a search.json may say besides

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
        compressed (`bool`): whether they hold values and masks instead of zeros.
        counted (`Verification`, *optional*): what was counted in the weights; `None` where the figures are those of
            the files, which agree with each other and may be wrong all the same.
    """

    name: str
    allocation: Allocation | None
    baselines: Mapping[str, Allocation] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    trace: SearchTrace | None = None
    evaluations: Sequence[Mapping[str, Any]] = ()
    bytes: int | None = None
    compressed: bool = False
    counted: Verification | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Outcome:
        """What is in `folder`.

        Raises:
            FileNotFoundError: it holds neither a pruned model nor a search.
            ValueError: a file in it cannot be read, or is a link out of it.
        """
        path = Path(folder)
        name = path.resolve().name
        for file in (CONFIG_NAME, "trace.jsonl", "search.json", "allocation.json"):
            if (path / file).is_file():
                own_file(path / file, path)
        if (path / CONFIG_NAME).is_file():
            return _model(path, name)
        trace = SearchTrace.load(path / "trace.jsonl") if (path / "trace.jsonl").is_file() else None
        if (path / "search.json").is_file():
            return _search(path, name, trace)
        if trace is None:
            raise FileNotFoundError(
                f"{path} holds neither {CONFIG_NAME} nor a search (search.json, trace.jsonl); give the folder of a "
                "pruned model or of a search."
            )
        facts = {"config": trace.settings.get("config")}
        if facts["config"] is not None:
            _check(facts, path / "trace.jsonl", {"config": Mapping, "config.sparsity": float})
        return cls(name, None, facts=facts, trace=trace)

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, as it was written."""
        return self.facts.get("config") or {}

    @property
    def achieved(self) -> Mapping[str, Any]:
        """Sparsity and counts of a pruned model; empty for a search."""
        return self.facts.get("achieved") or {}

    @property
    def training(self) -> Mapping[str, Any]:
        """What is known of training after pruning, or during it; empty where there was none."""
        return self.facts.get("recovery") or {}


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
    return Allocation(dict.fromkeys(allocation.sizes, mean), dict(allocation.sizes), "uniform", allocation.granularity)


def _model(path: Path, name: str) -> Outcome:
    """What `dsa_config.json` and the files beside it say."""
    facts = read_description(path)
    if facts is None:
        raise ValueError(f"{path / CONFIG_NAME} is a configuration; no pruned model lies beside it.")
    allocation = _allocation(path / CONFIG_NAME)
    if problem := next(contradictions(facts), None):
        raise ValueError(f"{path / CONFIG_NAME} contradicts itself: {problem}. It was changed after it was written.")
    stems = [encoding.stem for encoding in ENCODINGS.values() if not encoding.is_plain]
    compressed = any(any(path.glob(f"{stem}*.safetensors")) for stem in stems)
    weights = [weight.stat().st_size for weight in path.glob("*.safetensors")]
    return Outcome(
        name,
        allocation,
        {"uniform": uniform_like(allocation)},
        facts,
        evaluations=_evaluations(path),
        bytes=sum(weights) or None,
        compressed=compressed,
    )


def _search(path: Path, name: str, trace: SearchTrace | None) -> Outcome:
    """What `search.json` and the files beside it say."""
    file = path / "search.json"
    facts = _object(file)
    _check(facts, file, {"config": Mapping, "config.sparsity": float, "finalists": list})
    _check(facts, file, {name: kind for name, kind in _COUNTED.items() if name in facts})
    for row in facts["finalists"]:
        _check(row, file, {"validation_loss": float, "validation_perplexity": float, "allocation.name": str})
        _check(row, file, {"proxy_loss": float} if row.get("proxy_loss") is not None else {})
    allocation = _allocation(path / "allocation.json")
    baselines = {name: Allocation.from_dict(data) for name, data in facts.get("baselines", {}).items()}
    return Outcome(name, allocation, {"uniform": uniform_like(allocation), **baselines}, facts, trace)


def _allocation(path: Path) -> Allocation:
    """The allocation in a file, with at least one unit."""
    allocation = Allocation.load(path)
    if not allocation.sparsity:
        raise ValueError(f"{path} holds an allocation without units.")
    return allocation


def _check(facts: Any, path: Path, expected: Mapping[str, type]) -> None:
    """Raise `ValueError` unless the dotted names are there, with values of these types."""
    for name, kind in expected.items():
        value = facts
        for step in name.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        holds = is_real(value) if kind is float else is_whole(value) if kind is int else isinstance(value, kind)
        if not holds:
            shown = "nothing" if value is None else short(value)
            raise ValueError(f"{path}: {name} is a {kind.__name__.lower()}, got {shown}.")


def _object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected an object.")
    return data


def _evaluations(folder: Path) -> tuple[dict[str, Any], ...]:
    """The JSON files in `folder` that `evaluate --json` wrote, by name of file."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if not path.is_file() or path.stat().st_size > LARGEST_EVALUATION:
            continue
        try:
            data = _object(own_file(path, folder))
        except ValueError as error:
            logger.info("Not read for an evaluation: %s", one_line(str(error)))
            continue
        if _is_evaluation(data):
            found.append({**data, "perplexity": float(data["perplexity"])})
    return tuple(found)


def _is_evaluation(data: Mapping[str, Any]) -> bool:
    """Whether it says what was measured on what, in values that can be shown."""
    counts = [data.get(name) for name in ("windows", "sequence_length")]
    return (
        is_real(data.get("perplexity"))
        and isinstance(data.get("dataset"), str)
        and all(count is None or is_whole(count) for count in counts)
    )
