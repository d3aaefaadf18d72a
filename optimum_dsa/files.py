"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


LARGEST_JSON = 32 * 2**20  # bytes: several times what a model of 60 blocks and 400 experts needs


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON, larger than 32 MB, or nested too deep.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes; no file of this kind needs more than {LARGEST_JSON:,}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not JSON: it is nested too deep.") from None
    except ValueError as error:  # also of bytes that are no text, and of numbers of thousands of digits
        raise ValueError(f"{path} is not JSON: {error}.") from None


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old content or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_output(directory: str | Path, marker: str) -> None:
    """Raise `FileExistsError` where `directory` exists and neither is empty nor holds `marker` (is not ours)."""
    path = Path(directory)
    if path.is_dir() and (not any(path.iterdir()) or (path / marker).is_file()):
        return
    if path.exists():
        raise FileExistsError(f"{path} exists and was not written by optimum-dsa; choose another path or remove it.")


@contextmanager
def new_directory(directory: str | Path, marker: str) -> Iterator[Path]:
    """A fresh folder that takes the place of `directory` when the context ends well, and vanishes when it does not.

    A process that is killed leaves `directory` as it was (or, for an instant between two renames, under a hidden name
    beside it, from where the next call brings it back). What killed processes left beside it is removed.
    """
    check_output(directory, marker)
    path = Path(directory).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.dsa-old")
    if old.exists() and not path.exists():
        old.rename(path)
    for left in path.parent.glob(f".{path.name}.dsa-*"):
        shutil.rmtree(left, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.dsa-new-"))
    try:
        fresh.chmod(0o777 & ~_umask())
        yield fresh
        for file in fresh.rglob("*"):  # some writers make files that only their owner may read
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
