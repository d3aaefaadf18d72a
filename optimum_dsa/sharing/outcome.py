"""What lies in the folder of a model or of a search, read back to be shown."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.description import DescriptionError, contradictions, read_description, report_from
from ..checkpoint.encodings import ENCODINGS
from ..checkpoint.verify import Verification
from ..common.escaping import one_line
from ..common.files import read_json
from ..common.folder_files import own_file
from ..common.hub_file import model_name
from ..common.values import is_real, is_whole, short
from ..evaluation.measurement import Measurement
from ..evaluation.results import results_from
from ..evaluation.speed_result import SpeedComparison
from ..pruning.allocation import Allocation
from ..pruning.configuration import CONFIG_NAME
from ..pruning.report import PruningReport
from ..pruning.structured.described import widths_in
from ..pruning.zeros import FEWEST_ZEROS, MEASURED
from ..recovery.recoveries import RECOVERIES
from ..search.trace import SearchTrace


logger = logging.getLogger(__name__)

_COUNTED = {"trials": int, "tokens": int, "baselines": Mapping}  # what a search.json may say besides

LARGEST_EVALUATION = 1 << 22  # losses of every window among it


@dataclass(frozen=True)
class Outcome:
    """A model or a search, as its folder tells it; `Outcome.read` makes one.

    Attributes:
        name (`str`): the folder's.
        allocation (`Allocation`, *optional*): of the model, or of the search's winner; `None` while a search runs, and
            of a model without zeros.
        baselines (`Mapping[str, Allocation]`): others on the same model, such as "uniform" and "owl".
        facts (`Mapping[str, Any]`): the content of `dsa_config.json` or `search.json`.
        trace (`SearchTrace`, *optional*): of a search.
        evaluations (`Sequence[Measurement]`): what `optimum-cli dsa evaluate` wrote into the folder of this model.
        parent (`Sequence[Measurement]`): what it wrote of the dense model that this one is from.
        bytes (`int`, *optional*): of the weight files.
        compressed (`bool`): whether they hold values and masks instead of zeros.
        counted (`Verification`, *optional*): what was counted in the weights; `None` where the figures are those of
            the files, which agree with each other and may be wrong all the same.
        speed (`SpeedComparison`, *optional*): the latest that `optimum-cli dsa bench` wrote into the folder.
    """

    name: str
    allocation: Allocation | None
    baselines: Mapping[str, Allocation] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    trace: SearchTrace | None = None
    evaluations: Sequence[Measurement] = ()
    parent: Sequence[Measurement] = ()
    bytes: int | None = None
    compressed: bool = False
    counted: Verification | None = None
    speed: SpeedComparison | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Outcome:
        """What is in `folder`.

        Raises:
            FileNotFoundError: it holds neither a model nor a search.
            ValueError: a file in it cannot be read, or is a link out of it.
        """
        path = Path(folder)
        name = model_name(path)
        for file in (CONFIG_NAME, "trace.jsonl", "search.json", "allocation.json"):
            if (path / file).is_file():
                own_file(path / file, path)
        if (path / CONFIG_NAME).is_file():
            return _model(path, name)
        trace = SearchTrace.load(path / "trace.jsonl") if (path / "trace.jsonl").is_file() else None
        if (path / "search.json").is_file():
            return _search(path, name, trace)
        if trace is None and (path / "config.json").is_file():
            return _dense(path, name)
        if trace is None:
            raise FileNotFoundError(
                f"{path} holds neither a model (config.json, {CONFIG_NAME}) nor a search (search.json, trace.jsonl); "
                "give the folder of one."
            )
        facts = {"config": trace.settings.get("config")}
        if facts["config"] is not None:
            _check(facts, path / "trace.jsonl", {"config": Mapping, "config.sparsity": float})
        return cls(name, None, facts=facts, trace=trace)

    @property
    def is_dense(self) -> bool:
        """Whether it is a model of which nothing is known to be removed."""
        return self.trace is None and not self.facts

    @property
    def base(self) -> str | None:
        """Name of the dense model that it is from, where it is known; only the last part."""
        name = (self.facts.get("base_model") or {}).get("name")
        return last_part(name) if isinstance(name, str) else None

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, as it was written, with the method that chose the zeros: "unknown" where nothing says."""
        found = self.facts.get("config") or {}
        method = "unknown" if self.is_found else self.chosen_by
        return {**found, "method": method} if found and method else found

    @property
    def chosen_by(self) -> str | None:
        """The recovery method that chose the zeros; `None` where pruning did."""
        last = next((one for one in reversed(self.trainings) if self.moves_zeros(one)), None)
        return self.facts.get("chosen_by") or (last and last["config"]["method"])

    @property
    def structured(self) -> Mapping[str, Any]:
        """What was cut out of the model, as its file says; empty where nothing was."""
        return self.facts.get("structured") or {}

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Unit -> how many of its structures stay of how many; empty where nothing was cut out."""
        return widths_in(self.structured) if self.structured else {}

    @property
    def is_only_cut(self) -> bool:
        """Whether structures were cut out, and no zeros were made, but those that fill blocks up to the widest one."""
        if not self.structured or not self.is_found:
            return False
        return self.achieved["sparsity"] < FEWEST_ZEROS or self.structured["config"].get("layout") == "padded"

    @property
    def is_found(self) -> bool:
        """Whether nothing says how the zeros came about."""
        return (self.facts.get("allocation") or {}).get("name") == MEASURED and self.chosen_by is None

    @property
    def was_trained_sparse(self) -> bool:
        """Whether the model was dense until its training chose zeros: nothing pruned it."""
        return any((one.get("config") or {}).get("sparsity") is not None for one in self.trainings)

    @cached_property
    def report(self) -> PruningReport | None:
        """The report that its facts are; `None` of a search, and where they name what is not registered here."""
        try:
            return report_from(dict(self.facts)) if self.achieved else None
        except DescriptionError as error:
            logger.info("The report of %s is not read: %s", one_line(self.name), one_line(str(error)))
            return None

    @property
    def achieved(self) -> Mapping[str, Any]:
        """Sparsity and counts of a pruned model; empty for a search."""
        return self.facts.get("achieved") or {}

    @property
    def training(self) -> Mapping[str, Any]:
        """What is known of the last training after pruning, or during it; empty where there was none."""
        return self.facts.get("recovery") or {}

    @property
    def trainings(self) -> list[Mapping[str, Any]]:
        """The same of every training, first to last; earlier ones without losses."""
        return [*self.training.get("earlier", ()), self.training] if self.training else []

    @staticmethod
    def moves_zeros(training: Mapping[str, Any]) -> bool:
        """Whether a training chose the zeros, and did not keep those that were there."""
        method = (training.get("config") or {}).get("method")
        return method in RECOVERIES and RECOVERIES.fact(method, "moves_zeros", False)


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
    own, parent = _evaluations(path, facts)
    if problem := next(contradictions(facts), None):
        raise ValueError(f"{path / CONFIG_NAME} contradicts itself: {problem}. It was changed after it was written.")
    stems = [encoding.stem for encoding in ENCODINGS.values() if not encoding.is_plain]
    compressed = any(any(path.glob(f"{stem}*.safetensors")) for stem in stems)
    found = Outcome(
        name,
        allocation,
        {"uniform": uniform_like(allocation)},
        facts,
        evaluations=own,
        parent=parent,
        bytes=_bytes(path),
        compressed=compressed,
        speed=_speed(path, facts),
    )
    # Of a model without zeros there are no shares to be shown.
    return replace(found, allocation=None, baselines={}) if found.is_only_cut else found


def _dense(path: Path, name: str) -> Outcome:
    """A model without `dsa_config.json`: its name, its files, and what was measured of it."""
    _object(own_file(path / "config.json", path))
    own, _ = _evaluations(path, {})
    return Outcome(name, None, evaluations=own, bytes=_bytes(path), speed=_speed(path, {}))


def _bytes(path: Path) -> int | None:
    """Of the weight files."""
    return sum(weight.stat().st_size for weight in path.glob("*.safetensors")) or None


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


def _speed(folder: Path, facts: Mapping[str, Any]) -> SpeedComparison | None:
    """The latest of the JSON files in `folder` that `bench` wrote of a model with as many parameters as its own."""
    parameters = (facts.get("achieved") or {}).get("parameters")
    found = []
    for path, data in _json_files(folder):
        try:
            speed = SpeedComparison.from_dict(data)
        except ValueError as error:
            logger.info("%s is not read for speeds: %s", path.name, one_line(str(error)))
            continue
        if parameters in (None, next(iter(speed.speeds.values())).parameters):
            found.append(speed)
    return max(found, key=lambda speed: speed.date, default=None)


def _json_files(folder: Path) -> Iterator[tuple[Path, Any]]:
    """The JSON files in `folder` that may hold a measurement, with what is in them."""
    for path in sorted(folder.glob("*.json")):
        # Other programs leave JSON here too, a tokenizer of many megabytes among it.
        if path.is_file() and path.stat().st_size <= LARGEST_EVALUATION:
            try:
                yield path, read_json(own_file(path, folder))
            except ValueError as error:
                logger.info("Not read for a measurement: %s", one_line(str(error)))


def _evaluations(folder: Path, facts: Mapping[str, Any]) -> tuple[tuple[Measurement, ...], tuple[Measurement, ...]]:
    """What the JSON files in `folder` that `evaluate` wrote say of its model, and of the dense model it is from."""
    own: list[Measurement] = []
    parent: list[Measurement] = []
    achieved = facts.get("achieved") or {}
    known = {"sparsity": achieved.get("sparsity", 0.0), "size": achieved.get("prunable", 0)}
    for _, data in _json_files(folder):
        try:
            rows = _measured(data, {"model": model_name(folder), **known})
        except ValueError as error:
            logger.info("Not read for an evaluation: %s", one_line(str(error)))
            continue
        mine = rows if len(rows) == 1 else [row for row in rows if row.model == model_name(folder)]
        own += mine
        parent += [row for row in rows if row not in mine and _is_parent(row, facts, known["size"])]
    return tuple(own), tuple(parent)


def _is_parent(row: Measurement, facts: Mapping[str, Any], size: int) -> bool:
    """Whether a dense model was measured that has the base's name, or as many prunable weights."""
    name = (facts.get("base_model") or {}).get("name")
    named = isinstance(name, str) and last_part(row.model) == last_part(name)
    return row.sparsity < 0.01 and (named or row.size == size)


def last_part(name: str) -> str:
    """The last part of a path or a Hub id."""
    return re.split(r"[\\/]", name.rstrip("/\\"))[-1] or name


def _measured(data: Any, known: Mapping[str, Any]) -> list[Measurement]:
    """The measurements in a file's content, that of older versions as well; what a row leaves out is `known`."""
    if isinstance(data, Mapping) and "models" not in data:
        if not {"perplexity", "tasks"} & data.keys():
            raise ValueError("nothing was measured in it")
        data = {**known, **data}
    rows = results_from(data)
    if not any(row.perplexity is not None or row.tasks for row in rows):
        raise ValueError("nothing was measured in it")
    return rows
