"""Checkpoints written for other programs, one way: a row per format. Nothing of it is loaded here again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common.files import read_json
from ..common.registry import Registry
from .convert import check_not_quantised


@dataclass(frozen=True)
class Export:
    """A format of another program.

    Attributes:
        write (`Callable`): folder of a checkpoint, file to write, kind of its numbers -> bytes of the file.
        kinds (`tuple[str, ...]`): of numbers, the default first.
    """

    write: Callable[[Path, Path, str], int]
    kinds: tuple[str, ...]


def _gguf(folder: Path, path: Path, kind: str) -> int:
    return importlib.import_module(".gguf_file", __package__).write_gguf(folder, path, kind)


EXPORTS = Registry("export")
EXPORTS.add(
    "gguf",
    Export(_gguf, ("f16", "f32", "q8_0", "q4_0")),
    reference="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
)


def export(source: str | Path, target: str | Path, to: str, kind: str | None = None) -> int:
    """Write the checkpoint in the folder `source` to the file `target` as a row of `EXPORTS`; the bytes it has.

    The file is there whole or not at all.

    Args:
        kind (`str`, *optional*): of numbers in matrices: "f16", the default, "f32", "q8_0" or "q4_0".

    Raises:
        ValueError: it is of a family, or has a tokenizer, that the format cannot say; a kind that is none; or the
            library that writes the format is missing.
        FileNotFoundError: `source` holds no weights in safetensors.
    """
    source, target, row = Path(source), Path(target), EXPORTS[to]
    kind = kind or row.kinds[0]
    if kind not in row.kinds:
        raise ValueError(f"Numbers of a {to} file are {' or '.join(row.kinds)}, got {kind!r}.")
    if not source.is_dir():
        raise FileNotFoundError(f"No folder {source}.")
    if (source / "config.json").is_file():
        check_not_quantised(read_json(source / "config.json"), source)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"{target} is {'a folder' if target.is_dir() else 'in no folder'}; name a file to write.")
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        row.write(source, unfinished, kind)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target.stat().st_size
