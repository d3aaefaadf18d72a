"""Files, datasets and names -> texts, one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


# Short names: (repository, configuration, split, text column).
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
    "slimpajama": ("cerebras/SlimPajama-627B", None, "train", "text"),
}


def check_source(source: Any, text_column: str = "text", split: str | None = None) -> None:
    """Raise what reading `source` would raise at its start: to be called before a model is loaded.

    A file is opened, and of a dataset the first row is asked for. Texts in memory are left alone: they may come only
    once.
    """
    if isinstance(source, (str, Path)):
        next(iterate_texts(source, text_column, split), None)


def iterate_texts(source: Any, text_column: str = "text", split: str | None = None) -> Iterator[str]:
    """The texts of a source, one by one.

    A source is a list of texts; the path of a .txt (one text), .jsonl, .json or .parquet file; a `datasets` dataset;
    or the name of one: a short name (`wikitext2`, `c4`), a local folder, or a Hub repository, which is streamed.
    """
    import datasets

    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix == ".txt":
            yield _read(path)
            return
        if path.suffix == ".jsonl":
            source = _rows(path, text_column)
        else:
            source, text_column = _open_dataset(str(source), text_column, split)
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ValueError(f"Choose one split of the dataset: {', '.join(source)}.")
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        columns = source.column_names
        if columns and text_column not in columns:
            raise ValueError(f"The dataset has no column {text_column!r}; it has {', '.join(columns)}.")
        source = (row[text_column] for row in source)
    if not isinstance(source, Iterable):
        raise ValueError(f"Cannot read text from {type(source).__name__}; give texts, a path, a dataset or its name.")
    for text in source:
        if not isinstance(text, str):
            raise ValueError(f"Expected texts, got {type(text).__name__}: {str(text)[:60]!r}.")
        yield text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"No such file: {str(path)!r}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); convert it.") from None


def _rows(path: Path, text_column: str) -> Iterator[Any]:
    """The texts in a file of one JSON object per line. Read here: `datasets` does not say in which line it broke."""
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {str(path)!r}.")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}: not text in UTF-8; convert the file.") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); each line is an object.") from None
            if not isinstance(row, Mapping) or text_column not in row:
                has = f"it has {', '.join(row)}" if isinstance(row, Mapping) else f"it is a {type(row).__name__}"
                raise ValueError(f"{path}, line {number}: no column {text_column!r}; {has}.")
            yield row[text_column]


def _open_dataset(name: str, text_column: str, split: str | None) -> tuple[Iterable, str]:
    """The dataset behind a file or a name, and its column of text."""
    import datasets

    path = Path(name)
    builders = {".json": "json", ".parquet": "parquet"}
    # a Hub id has one slash at most, and none in front
    local = path.is_absolute() or name.startswith(("./", "../", "~")) or path.suffix in builders or name.count("/") > 1
    if not path.exists() and (local or (path.suffix and "/" not in name)):
        raise FileNotFoundError(f"No such file or folder: {name!r}.")
    if path.is_file() and path.suffix not in builders:
        raise ValueError(f"Cannot read {name!r}: expected .txt, .jsonl, .json or .parquet, or the name of a dataset.")
    repository, configuration, default_split, column = DATASETS.get(name, (name, None, "train", text_column))
    try:
        if path.is_file():
            return datasets.load_dataset(builders[path.suffix], data_files=name, split="train"), text_column
        data = datasets.load_dataset(repository, configuration, split=split or default_split, streaming=True)
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error.__cause__ or error).split()) or "it is empty"
        raise ValueError(f"Cannot load the dataset {name!r}: {why}") from error
    return data, column


def describe(source: Any) -> str:
    """A source in a few words; a path only by its last part."""
    if isinstance(source, (str, Path)):
        return Path(source).name if Path(source).exists() else str(source)
    if isinstance(source, Sequence):
        return f"{len(source)} texts"
    return getattr(source, "info", None) and source.info.dataset_name or type(source).__name__
