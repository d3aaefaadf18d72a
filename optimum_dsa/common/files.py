"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


DEEPEST_JSON = 64  # levels: what walks through JSON calls itself, and so must end before Python's own limit
LARGEST_JSON = 32 * 2**20  # bytes: several times what a model of 60 blocks and 400 experts needs


def read_json(path: str | Path, unique: bool = False) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON, larger than 32 MB, or nested too deep; with `unique`, also where an object has a
            name twice.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes; no file of this kind needs more than {LARGEST_JSON:,}.")
    try:
        return parse_json(path.read_text(encoding="utf-8"), unique)
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{path} is not JSON: {error}.") from None


def parse_json(text: str, unique: bool = False) -> Any:
    """The content of a JSON text; `ValueError` where it is none, or nested deeper than `DEEPEST_JSON`."""
    try:
        value = json.loads(text, object_pairs_hook=_of_unique_names if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value]
    for _ in range(DEEPEST_JSON):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return value
    raise ValueError("it is nested too deep")


def _of_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old content or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files that only their owner may read.
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The rights that new files do not get."""
    # There is no way to read it without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def free_name(path: Path) -> Path:
    """A name beside `path` that nothing has."""
    number = 1
    while os.path.lexists(free := path.with_name(f"{path.name}-kept-{number}")):
        number += 1
    return free


def remove_empty(folder: Path) -> None:
    """Remove folders without files, from the deepest up."""
    for place, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(place)
