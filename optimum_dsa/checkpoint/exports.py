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
        begins (`bytes`): what its files begin with.
    """

    write: Callable[[Path, Path, str], int]
    kinds: tuple[str, ...]
    begins: bytes


def _gguf(folder: Path, path: Path, kind: str) -> int:
    return importlib.import_module(".gguf_file", __package__).write_gguf(folder, path, kind)


EXPORTS = Registry("export")
EXPORTS.add(
    "gguf",
    Export(_gguf, ("f16", "f32", "q8_0", "q4_0"), b"GGUF"),
    reference="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
)


def export(source: str | Path, target: str | Path, to: str, kind: str | None = None) -> int:
    """Write the checkpoint in the folder `source` to the file `target` as a row of `EXPORTS`; the bytes it has.

    The file is there whole or not at all. One of the same format is replaced.

    Args:
        kind (`str`, *optional*): of numbers in matrices: "f16", the default, "f32", "q8_0" or "q4_0".

    Raises:
        ValueError: it is of a family, or has a tokenizer, that the format cannot say; a kind that is none; `target`
            has another ending than the format's; or the library that writes the format is missing.
        FileExistsError: `target` is a file of another kind.
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
    if target.suffix != f".{to}":
        raise ValueError(f"{target} is to be known as {to} by its ending; name {target}.{to}.")
    if target.exists() and not _begins(target, row.begins):
        raise FileExistsError(f"{target} is no {to} file, and would be replaced; name another.")
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        row.write(source, unfinished, kind)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target.stat().st_size


def _begins(file: Path, content: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(content)) == content
