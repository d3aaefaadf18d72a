"""Files, datasets and names -> texts, conversations or token ids, one by one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

from .chats import EXTRA, Chat, chat_columns, chat_from, is_conversation, messages_of
from .open_dataset import guarded, open_dataset, row_count
from .row_files import SUFFIXES, Row, read_blocks, read_rows
from .slices import Slice, parse_split
from .token_rows import is_loader, is_token_row, loader_rows, token_row


logger = logging.getLogger(__name__)

# Short names: (repository, configuration, split, text column).
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
    "slimpajama": ("cerebras/SlimPajama-627B", None, "train", "text"),
}
TEXT = "text"  # the column that is read where nobody names one

# A text, a part after the other where it is long; a conversation; token ids.
Item = str | Iterator[str] | Chat | list[int]


@dataclass
class Passed:
    """What is passed over while a source is read: rows with nothing in them.

    Attributes:
        rows: how many were read.
        null, empty: rows without a text, and with one that is blank.
        conversations: rows that went through a chat template.
        token_rows: windows that came as rows of token ids.
    """

    rows: int = 0
    null: int = 0
    empty: int = 0
    conversations: int = 0
    token_rows: int = 0

    def say(self, source: str, packed: bool = True) -> None:
        """Log what was passed over: a missing text may be a surprise, an empty one has no tokens to miss.

        And how conversations became windows: `packed`, or each by itself.
        """
        if self.null or self.empty:
            level = logging.WARNING if self.null else logging.INFO
            logger.log(
                level,
                "%s: %d of the %d rows that were read hold no text (%d null, %d empty) and were passed over.",
                source, self.null + self.empty, self.rows, self.null, self.empty,
            )  # fmt: skip
        if self.conversations:
            how = "packed: they follow each other in windows of equal length, without padding"
            how = how if packed else "padded: each is a window of its own, and padding is not counted"
            logger.info(
                "%s: %d conversations went through the tokenizer's chat template and are %s.",
                source, self.conversations, how,
            )  # fmt: skip

    def facts(self) -> dict[str, int]:
        """`null_rows` and `conversations`, where there are any."""
        found = {"null_rows": self.null, "conversations": self.conversations}
        return {name: count for name, count in found.items() if count}


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        text_column: the column of the text.
        split: of a dataset; or some of its rows, as in "train[:50]".
        subset: the configuration of a dataset that has several.
        otherwise: the split where none is named; `None` for the dataset's own.
        passed: what is passed over; counted on the way.
    """

    text_column: str = TEXT
    split: str | None = None
    subset: str | None = None
    otherwise: str | None = None
    passed: Passed = field(default_factory=Passed, compare=False)

    @property
    def parts(self) -> list[Slice] | None:
        """What `split` says."""
        return None if self.split is None else parse_split(self.split)

    def of(self, source: Any) -> Reading:
        """How one of several sources is read: a subset is one of a named dataset, and a .txt has no column."""
        own = self if names_dataset(source) else replace(self, subset=None)
        return replace(own, text_column=TEXT) if is_text_file(source) else own


def names_dataset(source: Any) -> bool:
    """Whether a source is the name or folder of a dataset, which has splits and subsets, and not a file."""
    if not isinstance(source, (str, Path)):
        return False
    return Path(source).suffix.lower() not in SUFFIXES or Path(source).is_dir()


def is_text_file(source: Any) -> bool:
    """Whether a source is a file that is one text."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".txt" and not Path(source).is_dir()


def check_source(source: Any, reading: Reading | None = None) -> None:
    """Raise what reading `source` would raise at its start: to be called before a model is loaded.

    A file is opened, and of a dataset the first row is asked for. Texts in memory are left alone: they may come only
    once.
    """
    reading = replace(reading or Reading(), passed=Passed())
    for one in source if is_mixture(source) else [source]:
        if isinstance(one, (str, Path)):
            item = next(read_items(one, reading.of(one) if is_mixture(source) else reading), None)
            # of a file two parts: what ends in the midst of a letter is found where nothing follows
            list(islice(item if isinstance(item, Iterator) else (), 2))


def is_mixture(source: Any) -> bool:
    """Whether a source is several with their weights; a dictionary of splits is none."""
    return isinstance(source, Mapping) and not hasattr(source, "column_names")


def iterate_texts(source: Any, text_column: str = TEXT, split: str | None = None) -> Iterator[str]:
    """The texts of a source, one by one and each in one piece.

    A source is a list of texts; the path of a .txt (one text), .jsonl, .json or .parquet file; a folder of such, or
    one that `Dataset.save_to_disk` wrote; a `datasets` dataset; or the name of one: a short name (`wikitext2`, `c4`)
    or a Hub repository, which is streamed.
    """
    for item in read_items(source, Reading(text_column, split)):
        if isinstance(item, (Chat, list)):
            raise ValueError(f"{describe(source)} holds {type(item).__name__}s, no texts; load_tokens reads them.")
        yield item if isinstance(item, str) else "".join(item)


def read_items(source: Any, reading: Reading) -> Iterator[Item]:
    """What [`iterate_texts`] describes, and conversations and rows of token ids as well; nulls are counted."""
    if isinstance(source, str) and source in DATASETS:
        reading = replace(reading, text_column=DATASETS[source][3])
    with ExitStack() as stack:
        if isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".txt":
            if reading.split is not None or reading.subset is not None:
                raise ValueError(f"{source} is one text, so that it has no split, rows or subset; leave them out.")
            if reading.text_column != TEXT:
                raise ValueError(f"{source} is one text, and has no column {reading.text_column!r}; leave it out.")
            yield dropwhile(lambda block: not block.strip(), read_blocks(Path(source)))
            return
        for where, row in _rows(source, reading, stack):
            reading.passed.rows += 1
            item = item_of(row, where, reading.text_column)
            if item is None or item == [] or isinstance(item, Chat) and not item.messages:
                reading.passed.null += item is None
                reading.passed.empty += item is not None
                continue
            if isinstance(item, Chat):
                _check_letters(json.dumps(item.messages, ensure_ascii=False, default=str), where)
                reading.passed.conversations += 1
            yield item


def item_of(row: Any, where: str, column: str) -> Item | None:
    """What a row holds: text, a conversation, token ids, or `None` for nothing."""
    if isinstance(row, Mapping):
        if column in row:
            row = row[column]
        elif column == TEXT and (names := chat_columns([*row])):
            return chat_from(row, names, where)
        elif column == TEXT and "input_ids" in row:
            return token_row(row["input_ids"], row.get("attention_mask"))
        else:
            raise ValueError(f"{where}: no column {column!r}; it has {', '.join(map(str, row)) or 'none'}.")
    if row is None or isinstance(row, float) and row != row:  # a data frame has NaN where nothing is
        return None
    if is_conversation(row):
        return Chat(messages_of(row, where), where)
    if is_token_row(row):
        return token_row(row)
    if not isinstance(row, str):
        raise ValueError(f"{where}: expected a text, got {type(row).__name__}: {str(row)[:60]!r}.")
    _check_letters(row, where)
    return row


def _check_letters(text: str, where: str) -> None:
    """Raise where JSON has spelled half of a letter, which no tokenizer takes; a text in UTF-8 has none."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: the text has half a letter, {text[error.start]!r}, a surrogate without its other; write "
                "the letter whole, or leave the row out."
            ) from None


def needed_columns(columns: Sequence[str], column: str) -> list[str] | None:
    """Of a table's columns those that [`item_of`] looks at; `None` where it looks in vain."""
    if column in columns:
        return [column]
    names = (chat_columns(columns) or (("input_ids",) if "input_ids" in columns else None)) if column == TEXT else None
    return names and [*names, *(extra for extra in (*EXTRA, "attention_mask") if extra in columns)]


def _rows(source: Any, reading: Reading, stack: ExitStack) -> Iterator[Row]:
    """The rows of a source, each with its place in words."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix.lower() == ".jsonl" or path.is_file() and path.suffix.lower() in SUFFIXES:
            return _file_rows(path, reading)
        return _named_rows(str(source), reading, stack)
    return _rows_in_memory(source, reading)


def _file_rows(path: Path, reading: Reading) -> Iterator[Row]:
    if reading.subset is not None:
        raise ValueError(f"{path} is a file, and has no subset {reading.subset!r}; leave it out.")

    def rows() -> Iterator[Row]:
        return read_rows(path, lambda columns: needed_columns(columns, reading.text_column))

    for part in _only_split(reading, f"{path} is a file, which"):
        yield from part.of(rows(), lambda: sum(1 for _ in rows()))


def _only_split(reading: Reading, what: str, own: str | None = None) -> list[Slice]:
    """The parts of what has no splits; another name than `own` or "train" is refused."""
    parts = reading.parts or [Slice("train")]
    for part in parts:
        if part.name not in (own, "train"):
            raise ValueError(
                f"{what} has no split {part.name!r}; leave split out, or take some of its rows with train[:50]."
            )
    return parts


def _named_rows(name: str, reading: Reading, stack: ExitStack) -> Iterator[Row]:
    repository, subset, split, _ = DATASETS.get(name, (name, None, "train", TEXT))
    for part in parse_split(reading.split or reading.otherwise or split):
        named = part.name if reading.split else None
        data = open_dataset(name, repository, reading.subset or subset, part.name, named, stack)
        yield from _dataset_rows(data, part, name, reading.text_column, Path(repository).exists())


def _dataset_rows(data: Any, part: Slice, name: str, column: str, local: bool = True) -> Iterator[Row]:
    """The rows of a `datasets` dataset, of no more columns than are needed: others may be costly to decode."""
    if columns := data.column_names:
        needed = needed_columns(columns, column)
        if needed is None:
            raise ValueError(f"The dataset has no column {column!r}; it has {', '.join(columns)}.")
        data = data.select_columns(needed)
    rows = guarded(part.of(data, lambda: row_count(data, part.name, local)), name)
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _rows_in_memory(source: Any, reading: Reading) -> Iterator[Row]:
    import datasets

    if reading.subset is not None:
        raise ValueError(f"{describe(source)} has no subset {reading.subset!r}; leave it out.")
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        for part in reading.parts or ():
            if part.name not in source:
                raise ValueError(f"The dataset has no split {part.name!r}; it has {', '.join(source)}.")
            yield from _dataset_rows(source[part.name], part, describe(source), reading.text_column)
        if reading.split is None:
            raise ValueError(f"Choose one split of the dataset: {', '.join(source)}.")
    elif isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        own = None if source.split is None else str(source.split)
        for part in _only_split(reading, f"{describe(source)} is one split, which", own):
            yield from _dataset_rows(source, part, describe(source), reading.text_column)
    else:
        rows = _plain_rows(source)
        for part in _only_split(reading, describe(source)):
            taken = part.of(rows, lambda: len(source))
            yield from ((f"{describe(source)}, row {number}", row) for number, row in enumerate(taken, 1))


def _plain_rows(source: Any) -> Iterable[Any]:
    if is_loader(source):
        return loader_rows(source)
    if hasattr(source, "iloc") and hasattr(source, "columns"):  # a data frame gives its columns' names otherwise
        return ({name: row[name] for name in source.columns} for _, row in source.iterrows())
    if not isinstance(source, Iterable):
        raise ValueError(f"Cannot read text from {type(source).__name__}; give texts, a path, a dataset or its name.")
    return source


def describe(source: Any) -> str:
    """A source in a few words; a path only by its last part."""
    if isinstance(source, (str, Path)):
        return Path(source).name if Path(source).exists() else str(source)
    if is_mixture(source):
        return " + ".join(f"{weight:g} {describe(one)}" for one, weight in source.items())
    if isinstance(source, Sequence):
        return f"{len(source)} texts"
    return getattr(getattr(source, "info", None), "dataset_name", None) or type(source).__name__
