"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
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
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The rights that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
