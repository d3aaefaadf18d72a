"""`dsa_config.json`: what was done to a model; its schema, versions and checksum."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_text
from ..common.installation import how_to_upgrade
from ..common.schema import violations
from ..common.settings import nested, settings_schema
from ..common.versions import versions
from ..pruning.allocation import ALLOCATIONS, AllocationFunction
from ..pruning.configuration import CONFIG_NAME, FORMAT_VERSION, DSAConfig
from ..pruning.report import PruningReport
from ..pruning.structured.configuration import DSAStructuredConfig
from ..pruning.structured.described import disagreements


class DescriptionError(ValueError):
    """A `dsa_config.json` that does not describe a pruned model as its schema says."""


class Description(dict):
    """The content of a `dsa_config.json`, brought to the present version.

    Attributes:
        version (`int`): of the format in which it was written.
        written (`dict`): what was written, where that was an earlier version.
    """

    version = FORMAT_VERSION
    written: dict[str, Any] | None = None


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of `dsa_config.json`, in the version that is written; what a config may be, from its fields."""
    found = json.loads(Path(__file__).with_name("dsa_config.schema.json").read_text(encoding="utf-8"))
    allocation = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/allocation"}]}
    note = {"description": "The DSAConfig; which names exist is checked against the tables."}
    found["properties"]["config"] = note | settings_schema(DSAConfig, {"allocation": allocation})
    note = {"description": "The DSAStructuredConfig; which names exist is checked against the tables."}
    found["$defs"]["cut"]["properties"]["config"] = note | settings_schema(
        DSAStructuredConfig, {"allocation": allocation}
    )
    return found


def describe(
    report: PruningReport, base: dict[str, str | None], recovery: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `dsa_config.json`: config, base model, allocation, achieved sparsity, calibration, versions.

    `recovery` is what is known of training after pruning, or during it.

    An allocation that was given as a file is written out: the file's path is of no use to others, and none of their
    business.
    """
    data = {"format_version": FORMAT_VERSION, "base_model": base, **report.to_dict(), "versions": versions()}
    data["config"] = {**data["config"], "allocation": _portable(data)}
    return data if recovery is None else {**data, "recovery": recovery}


def after(earlier: Mapping[str, Any] | None, training: dict[str, Any]) -> dict[str, Any]:
    """`training`, an entry `recovery` of `dsa_config.json`, with what trained the model before, first to last.

    These are in its "earlier", without their histories.
    """
    if not earlier:
        return training
    before = {name: value for name, value in earlier.items() if name not in ("earlier", "history")}
    return {**training, "earlier": [*earlier.get("earlier", ()), before]}


def write_description(folder: Path, data: dict[str, Any]) -> None:
    """Write `dsa_config.json` into `folder`, with its checksum."""
    data = {name: value for name, value in data.items() if name != "checksum"}
    write_text(folder / CONFIG_NAME, json.dumps({**data, "checksum": checksum(data)}, indent=2) + "\n")


def read_description(path: str | Path) -> Description | None:
    """The content of a `dsa_config.json`, brought to the present version; `None` where it is a bare `DSAConfig`.

    Raises:
        DescriptionError: it breaks the schema, or was written by a newer version.
        FileNotFoundError: there is none.
    """
    path = Path(path)
    path = path / CONFIG_NAME if path.is_dir() else path
    try:
        data = read_json(path)
    except ValueError as error:
        raise DescriptionError(str(error)) from None
    if not isinstance(data, dict):
        raise DescriptionError(f"{path} holds no description of a pruned model: expected an object.")
    if "allocation" not in data or "achieved" not in data:
        return None
    version = data.get("format_version", 1)  # the first did not always say so
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DescriptionError(f"{path}: format_version is a whole number of at least 1, got {version!r}.")
    if version > FORMAT_VERSION:
        raise DescriptionError(
            f"{path} has version {version} of the format, and this optimum-dsa knows up to {FORMAT_VERSION}; upgrade "
            f"it with {how_to_upgrade()}."
        )
    written = data if version < FORMAT_VERSION else None
    # One step at a time, so that a new version takes one migration, whatever files there are.
    for number in range(version, FORMAT_VERSION):
        data = MIGRATIONS[number](data)
    broken = next(violations(data, schema()), None)
    if broken:
        raise DescriptionError(f"{path} does not follow its schema: {broken}.")
    found = Description(data)
    found.version, found.written = version, written
    return found


def base_files_in(folder: str | Path) -> dict[str, Any]:
    """What the `dsa_config.json` in `folder` says of its base's files, under the key that it has there; or nothing."""
    found = read_description(folder) or {}
    return {name: found[name] for name in ("base_files",) if name in found}


def checksum(data: dict[str, Any]) -> str:
    """SHA-256 of a description without its `checksum`: of its JSON with sorted keys, without spaces, in ASCII."""
    content = {name: value for name, value in data.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal_of(data: Mapping[str, Any]) -> str:
    """What is known of a description since it was written.

    "kept" (as its checksum says), "broken" (not so), "missing" (it lacks the checksum that its version has), or "none"
    (of version 1, which had no checksum; nothing vouches for it).
    """
    version = data.version if isinstance(data, Description) else data.get("format_version", 1)
    if version == 1:
        return "none"
    # The checksum is of what was written, before it was brought to the present version.
    content = getattr(data, "written", None) or data
    stated = content.get("checksum")
    if stated is None:
        return "missing"
    return "kept" if stated == checksum(content) else "broken"


def is_unchanged(data: Mapping[str, Any]) -> bool:
    """Whether nothing speaks against a description's being as it was written; of version 1 nothing speaks for it."""
    return seal_of(data) in ("kept", "none")


def contradictions(data: Mapping[str, Any]) -> Iterator[str]:
    """Where the totals of a description are not those of its units, each as a sentence."""
    achieved, sizes = data["achieved"], data["allocation"]["sizes"]
    units = achieved["units"]
    if units.keys() != sizes.keys():
        odd = sorted(units.keys() ^ sizes.keys())
        yield f"allocation and achieved sparsity are given for different units, such as {odd[0]}"
        return
    removed, prunable = sum(round(units[unit] * size) for unit, size in sizes.items()), sum(sizes.values())
    if prunable > achieved["parameters"]:
        yield f"its units have {prunable:,} weights, and achieved.parameters is {achieved['parameters']:,}"
    expected = {
        "removed": removed,
        "prunable": prunable,
        "sparsity": removed / max(prunable, 1),
        "sparsity_of_all_parameters": removed / achieved["parameters"],
    }
    for name, value in expected.items():
        if not math.isclose(achieved[name], value, rel_tol=1e-9, abs_tol=1e-12):
            yield f"achieved.{name} is {achieved[name]:,}, and its units make {value:,}"
    if cut := data.get("structured"):
        yield from disagreements(cut)


def report_from(data: dict[str, Any]) -> PruningReport:
    """The report in a description; what cannot be an allocation's name here is replaced by the allocation.

    Raises:
        DescriptionError: its config is not valid, or names what is not registered here.
    """
    try:
        report = PruningReport.from_dict({**data, "config": {**data["config"], "allocation": _portable(data)}})
    except (ValueError, KeyError) as error:
        raise DescriptionError(
            f"{CONFIG_NAME} describes what cannot be: {error} Import what registers own names first."
        ) from None
    if odd := sorted(report.achieved.keys() ^ report.allocation.sizes.keys()):
        raise DescriptionError(
            f"{CONFIG_NAME} describes what cannot be: allocation and achieved sparsity are given for different units, "
            f"such as {odd[0]}."
        )
    return report


def _portable(data: dict[str, Any]) -> Any:
    """The config's allocation, or what was made of it if it is neither a name nor a function nor given in full."""
    name = data["config"].get("allocation", "dsa")
    if not isinstance(name, str) or name in ALLOCATIONS:
        return name
    try:
        AllocationFunction.parse(name)
    except (ValueError, KeyError):
        return data["allocation"]
    return name


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Version 2 has a checksum, and never the path of an allocation."""
    data = {**data, "format_version": 2}
    if isinstance(data.get("config"), dict):
        data["config"] = {**data["config"], "allocation": _portable(data)}
    return {"base_model": {"name": None, "revision": None}, "versions": {}, **data}


def _from_version_2(data: dict[str, Any]) -> dict[str, Any]:
    """Version 3 has sections in the config: what is said of data and of the update."""
    data = {**data, "format_version": 3}
    if isinstance(data.get("config"), dict):
        try:
            data["config"] = nested(DSAConfig, data["config"])
        except ValueError as error:
            raise DescriptionError(f"{CONFIG_NAME}: {error}") from None
        if not isinstance(data["config"].get("update", {}), dict):  # before, only the update's name
            data["config"]["update"] = {"name": data["config"]["update"]}
    return data


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1, 2: _from_version_2}
