"""What was cut out of a model, as JSON values: the section "structured" of `dsa_config.json`, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from ..allocation import ALLOCATIONS, Allocation, AllocationFunction
from ..training import Reconstruction
from .configuration import DSAStructuredConfig
from .prune import StructuredReport, stays_in
from .structure import Place
from .widths.shares import SHARES


# Fields that have a form of their own; all others are JSON values as they are.
_FORMED = ("config", "kept", "gone", "costs", "places", "reconstruction", "allocation", "earlier", "seconds")


def structured_to(report: StructuredReport) -> dict[str, Any]:
    """JSON values of a report; by unit what stays, what went, and where it can be counted."""
    units = {
        unit: {
            "kept": stay,
            "of": stay + len(report.gone[unit]),
            "cost": report.costs[unit],
            "gone": _in_ranges(report.gone[unit]),
            **(asdict(report.places[unit]) if unit in report.places else {}),
        }
        for unit, stay in report.kept.items()
    }
    plain = {each.name: getattr(report, each.name) for each in fields(report) if each.name not in _FORMED}
    config, allocation = report.config.to_dict(), report.allocation and report.allocation.to_dict()
    if _is_place(config["allocation"]):  # a file's path is of no use to others; what was read there is
        config["allocation"] = allocation
    return {
        "config": config,
        "units": units,
        "sparsity": report.sparsity,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()},
        "allocation": allocation,
        "reconstruction": {block: asdict(found) for block, found in report.reconstruction.items()},
        "seconds": round(report.seconds, 3),
        **({"earlier": list(map(structured_to, report.earlier))} if report.earlier else {}),
    }


def _is_place(allocation: Any) -> bool:
    """Whether an allocation is neither a name nor a function nor given in full."""
    if not isinstance(allocation, str) or allocation in SHARES or allocation in ALLOCATIONS:
        return False
    try:
        AllocationFunction.parse(allocation)
    except (ValueError, KeyError):
        return True
    return False


def structured_from(data: Mapping[str, Any]) -> StructuredReport:
    """The report whose `structured_to` gave `data`.

    Raises:
        ValueError: the config has what is no setting, or a unit's numbers are none.
    """
    return replace(_one_from(data), earlier=tuple(map(_one_from, data.get("earlier", ()))))


def _one_from(data: Mapping[str, Any]) -> StructuredReport:
    """The report without what was cut out before."""
    units, places = data["units"], {}
    for unit, one in units.items():
        if {"matrix", "axis", "size"} <= one.keys():
            places[unit] = Place(**{part.name: one[part.name] for part in fields(Place) if part.name in one})
    allocation = data.get("allocation")
    known = {each.name for each in fields(StructuredReport)} - {*_FORMED}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name in known}
    return StructuredReport(
        config=DSAStructuredConfig.from_dict(data["config"]),
        kept={unit: one["kept"] for unit, one in units.items()},
        gone={unit: tuple(_from_ranges(one["gone"], one["of"])) for unit, one in units.items()},
        costs={unit: one["cost"] for unit, one in units.items()},
        places=places,
        allocation=Allocation.from_dict(allocation) if allocation else None,
        reconstruction={block: Reconstruction(**found) for block, found in data.get("reconstruction", {}).items()},
        seconds=data.get("seconds", 0.0),
        **plain,
    )


def disagreements(data: Mapping[str, Any]) -> Iterator[str]:
    """Where a section "structured" is not one with itself, each as a sentence."""
    for unit, one in data["units"].items():
        try:
            gone = sum(1 for _ in _from_ranges(one["gone"], one["of"]))
        except ValueError as error:
            yield f"{unit}: {error}"
            continue
        if one["kept"] + gone != one["of"]:
            yield f"{unit} keeps {one['kept']:,} of {one['of']:,} structures, and other ones are said to be gone"
    gone = sum((one["of"] - one["kept"]) * one["cost"] for one in data["units"].values())
    # Of blocks the cost is that of the largest.
    blocks = any(_kind(unit) == "block" for unit in data["units"])
    if data["removed"] != gone and not (blocks and data["removed"] <= gone):
        yield f"structured.removed is {data['removed']:,}, and the structures that went have {gone:,} parameters"
    if abs(data["sparsity"] - (share := data["removed"] / data["prunable"])) > 1e-9:
        yield f"structured.sparsity is {data['sparsity']:,}, and its counts make {share:,}"
    for one in data.get("earlier", ()):
        yield from disagreements({**one, "earlier": ()})


def after(report: StructuredReport, before: StructuredReport | None) -> StructuredReport:
    """`report` with what was cut out of the model before it."""
    if before is None:
        return report
    return replace(report, earlier=(*before.earlier, replace(before, earlier=()), *report.earlier))


def widths(report: StructuredReport) -> dict[str, tuple[int, int, Place | None]]:
    """Unit -> how many stay, how many there were before all cuts, and where they can be counted now."""
    found: dict[str, tuple[int, int, Place | None]] = {}
    for one in (*report.earlier, report):
        for unit, stay in one.kept.items():
            found = _without(found, unit, one.gone[unit])
            were = found[unit][1] if unit in found else stay + len(one.gone[unit])
            found[unit] = stay, were, one.places.get(unit)
    return found


def widths_in(data: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Unit -> how many stay and how many there were before all cuts, of a section "structured"."""
    found: dict[str, tuple[int, int, None]] = {}
    for one in (*data.get("earlier", ()), data):
        for unit, each in one["units"].items():
            found = _without(found, unit, tuple(_from_ranges(each["gone"], each["of"])))
            found[unit] = each["kept"], found[unit][1] if unit in found else each["of"], None
    return {unit: (stay, were) for unit, (stay, were, _) in found.items()}


def _kind(unit: str) -> str:
    return unit.partition(":")[2].partition(".")[0]


def _without(found: dict[str, tuple], unit: str, gone: Collection[int]) -> dict[str, tuple]:
    """What is `found` of units, once blocks of the list that a `unit` is of are gone and the others close up."""
    if _kind(unit) != "block":
        return found
    stack, went = unit.partition(":")[0], {*gone}

    def moved(name: str) -> str | None:
        if not (match := re.match(rf"{re.escape(stack)}\.(\d+)(?=[.:])", name)):
            return name
        number = int(match[1])
        closed = number - sum(other < number for other in went)
        return None if number in went else f"{stack}.{closed}{name[match.end() :]}"

    return {
        new: (stay, were, place and replace(place, matrix=moved(place.matrix)))
        for name, (stay, were, place) in found.items()
        if (new := moved(name)) is not None
    }


def parameters_before(data: Mapping[str, Any]) -> int:
    """Parameters of the model before all cuts of a section "structured"."""
    return (*data.get("earlier", ()), data)[0]["parameters"]


def stay_of(found: Mapping[str, tuple[int, int]]) -> str:
    """Such as "ffn: 34 to 40 of 48 stay", by kind, of unit -> how many stay of how many."""
    return ", ".join(f"{kind}: {stays_in(list(one.values()))}" for kind, one in by_kind(found).items())


def by_kind(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Kind -> block -> what is said of the unit; of the second of a kind in a block the block is "layers.3:1"."""
    kinds: dict[str, dict[str, Any]] = {}
    for unit, value in found.items():
        block, _, named = unit.partition(":")
        kind, _, number = named.partition(".")
        kinds.setdefault(kind, {})[f"{block}:{number}" if number else block] = value
    return kinds


def renamed(report: StructuredReport, name: Callable[[str], str]) -> StructuredReport:
    """`report` under the names that units, matrices and blocks have in another model."""

    def own(values: Mapping) -> dict:
        return {name(key): value for key, value in values.items()}

    allocation = report.allocation and replace(
        report.allocation, sparsity=own(report.allocation.sparsity), sizes=own(report.allocation.sizes)
    )
    return replace(
        report,
        allocation=allocation,
        **{part: own(getattr(report, part)) for part in ("kept", "gone", "costs", "left", "reconstruction")},
        places={name(unit): replace(place, matrix=name(place.matrix)) for unit, place in report.places.items()},
        earlier=tuple(renamed(one, name) for one in report.earlier),
    )


def _in_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text, "0-3,7"; a file of many thousands is read by people, too."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _from_ranges(text: str, below: int) -> Iterator[int]:
    """The numbers in such a text, all of them less than `below`."""
    for part in filter(None, text.split(",")):
        ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not ends or not int(ends[1]) <= int(ends[2] or ends[1]) < below:
            raise ValueError(f"numbers of {below:,} structures are as in '0-3,7', got {part[:40]!r}")
        yield from range(int(ends[1]), int(ends[2] or ends[1]) + 1)
