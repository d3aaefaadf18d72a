"""Files -> rows, one by one: read no further than asked for, and never copied. A path is taken as it is written."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


BLOCK = 2**20  # bytes that are read at once
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

Row = tuple[str, Any]  # where it stands, in words, and what it is
Choose = Callable[[Sequence[str]], list[str] | None]  # of all columns, those that are needed; `None`: all


def read_rows(path: Path, choose: Choose = lambda columns: None) -> Iterator[Row]:
    """The rows of a .jsonl, .json or .parquet file, each with its place; `choose` spares columns where that helps.

    Raises:
        ValueError: the file is broken; it names the place.
    """
    if path.suffix.lower() == ".parquet":
        return _records(_there(path), choose)
    return (_lines if path.suffix.lower() == ".jsonl" else _values)(_there(path))


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file in UTF-8, part by part, with "\\n" for every kind of line break."""
    # Decoded here and not by open(): that does not say at which byte of the file it broke.
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    done = 0
    with _there(path).open("rb") as file:
        while True:
            block = file.read(BLOCK)
            done += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                byte = done - len(error.object) + error.start
                raise ValueError(f"{path} is not text in UTF-8 ({error.reason} at byte {byte}); convert it.") from None
            if text:
                yield text
            if not block:
                return


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {str(path)!r}.")
    return path


def _lines(path: Path) -> Iterator[Row]:
    """One JSON value per line. Read here: `datasets` does not say in which line it broke."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"{where}: not text in UTF-8; convert the file.") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}); each line is an object.") from None
            yield where, value


def _values(path: Path) -> Iterator[Row]:
    """The elements of a JSON array, or JSON values that follow each other, however they are laid out."""
    decoder, blocks = json.JSONDecoder(), read_blocks(path)
    text, at, number, array = next(blocks, "").lstrip(), 0, 0, False
    if text.startswith("["):
        array, at = True, 1
    while True:
        at = _behind(text, at, "," if array and number else "")
        try:
            if array and text[at : at + 1] == "]":
                return
            value, end = decoder.raw_decode(text, at)
            if end == len(text):  # a number may go on in the next block
                raise json.JSONDecodeError("it ends here", text, end)
        except (ValueError, RecursionError) as error:
            # The value may end in a later block. As much as there is again is read, so that a long one is not
            # begun anew for every block.
            more, size = [], 0
            while size < max(len(text) - at, 1) and (block := next(blocks, None)) is not None:
                more, size = [*more, block], size + len(block)
            if more:
                text, at = text[at:] + "".join(more), 0
                continue
            rest = text[at:].strip()
            if not rest and not array:
                return
            if array or not _is_json(rest):
                raise ValueError(f"{path}, row {number + 1}: not JSON ({error}).") from None
            value, end = json.loads(rest), len(text)
        number += 1
        yield f"{path}, row {number}", value
        at = end


def _behind(text: str, at: int, separator: str) -> int:
    """The place of the next thing that is neither blank nor the separator."""
    while at < len(text) and (text[at].isspace() or text[at] == separator):
        at += 1
    return at


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _records(path: Path, choose: Choose) -> Iterator[Row]:
    """The rows of a parquet file, a batch of them in memory."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=choose(file.schema_arrow.names)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"Cannot load the dataset {str(path)!r}: {why}") from error
