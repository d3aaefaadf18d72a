"""Names and folders -> `datasets` datasets that are read row by row; their errors in one line."""

from __future__ import annotations

import glob
import mimetypes
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .row_files import SUFFIXES


# What `datasets` reads a file as, by its ending, and names of files that are no data.
_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_ASIDE = ("metadata.jsonl", "metadata.csv", "dataset_info.json", "dataset_infos.json", "README", "LICENSE", "NOTICE")


def open_dataset(
    name: str, repository: str, subset: str | None, split: str, named: str | None, stack: ExitStack
) -> Any:
    """The split of the dataset behind a folder or a Hub id, to be read row by row; nothing is copied into a cache.

    Args:
        name: what the user wrote, for errors.
        repository: a folder or Hub id.
        subset: the dataset's configuration, where it has several.
        split: a split's name.
        named: the same where the user said it; `None` where it is a default, which what has one split only is above.
        stack: what has to stay until the rows are read.

    Raises:
        ValueError: there is no such dataset, subset or split.
    """
    import datasets

    _check_name(name)
    path = Path(repository)
    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            return _saved(path, subset, split, named)
        # `datasets` takes the folder's own name for a pattern, and would read its neighbours
        if path.is_dir() and glob.escape(str(path.resolve())) != str(path.resolve()):
            repository = _linked(path, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optimum-dsa-"))))
        return datasets.load_dataset(repository, subset, split=split, streaming=True, **_whole_texts(path))
    except Exception as error:  # noqa: BLE001 - a dataset's loader may raise anything
        raise ValueError(f"Cannot load the dataset {name!r}: {_why(error)}") from error


def _check_name(name: str) -> None:
    """Raise where `name` is a path, and nothing is there that could be read: it is not looked for on the Hub."""
    path = Path(name)
    # a Hub id has one slash at most, and none in front
    local = path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1
    local = local or path.suffix.lower() in SUFFIXES
    if not path.exists() and (local or (path.suffix and "/" not in name)):
        raise FileNotFoundError(f"No such file or folder: {name!r}.")
    if path.is_file():
        raise ValueError(f"Cannot read {name!r}: expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or a dataset.")


def _whole_texts(folder: Path) -> dict[str, str]:
    """Options by which a folder of .txt files is read as its files are: each is one text, and no line is.

    Raises:
        ValueError: the folder has files of several kinds, of which `datasets` would read one without a word.
    """
    if not folder.is_dir() or (folder / "README.md").is_file():  # a card may say which files are meant
        return {}
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*")):
        if (mimetypes.guess_type(file.name)[0] or "").startswith(("image", "audio", "video")):
            return {}  # what is beside it describes it
        kind = _KINDS.get(file.suffix.lower())
        if kind and file.name not in _ASIDE and file.stem.upper() not in _ASIDE and not file.name.startswith("."):
            found.setdefault(kind, file.name)
    if len(found) > 1:
        raise ValueError(
            f"it has files of {len(found)} kinds, such as {' and '.join(found.values())}, of which one would be read "
            "alone; put each kind into a folder of its own, or name the files"
        )
    return {"sample_by": "document", "encoding": "utf-8-sig"} if "text" in found else {}


def _linked(folder: Path, place: Path) -> str:
    """A folder under another name, with links to all files of `folder`."""
    for file in folder.resolve().rglob("*"):
        if file.is_file():
            link = place / file.relative_to(folder.resolve())
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return str(place)


def _saved(path: Path, subset: str | None, split: str, named: str | None) -> Any:
    """What `save_to_disk` wrote, as it lies on the disk."""
    import datasets

    if subset is not None:
        raise ValueError(f"save_to_disk wrote it, so that it has no subset {subset!r}; leave it out")
    data = datasets.load_from_disk(str(path.resolve()))
    if not isinstance(data, datasets.DatasetDict):
        own = str(data.split) if data.split is not None else None
        if named not in (None, own, "train"):
            raise ValueError(f"save_to_disk wrote one split, and it has no {named!r}; leave split out")
        return data
    if split not in data:
        raise ValueError(f"it has no split {split!r}; it has {', '.join(data)}")
    return data[split]


def row_count(data: Any, split: str, local: bool) -> int:
    """How many rows a dataset has; those of a streamed one on the disk are counted, which reads it once.

    Raises:
        ValueError: it is streamed from elsewhere, and nothing says how many there are.
    """
    if hasattr(data, "__len__"):
        return len(data)
    splits = getattr(data.info, "splits", None) or {}
    if known := getattr(splits.get(split), "num_examples", None):
        return known
    if local:
        return sum(1 for _ in data)
    raise ValueError(
        f"Nothing says how many rows the split {split!r} has, so a share or the end of it cannot be taken; name rows "
        f"from its beginning, as in {split}[:1000]."
    )


def guarded(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """The rows; whatever goes wrong while they are fetched is a `ValueError` that names the dataset."""
    rows = iter(rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - a dataset's loader may raise anything
            raise ValueError(f"Cannot read the dataset {name!r}: {_why(error)}") from error
        yield row


def _why(error: Exception) -> str:
    """An error in one line; of a chain that wraps the cause, the cause."""
    text = " ".join(str(error.__cause__ or error).split()) or " ".join(str(error).split()) or "it is empty"
    hint = "; name one with subset (--subset)" if "onfig name is missing" in text else ""
    hint = "; name one that it has with split (--split)" if "Bad split" in text else hint
    return (text if len(text) <= 400 else f"{text[:400]}…") + hint
