"""Texts, files and datasets -> token windows; disjoint parts for calibration, validation and test."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .common.settings import check_settings, setting
from .evaluation.perplexity import check_tokens


# Short names: (repository, configuration, split, text column).
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
    "slimpajama": ("cerebras/SlimPajama-627B", None, "train", "text"),
}

SAMPLES = 128  # sequences of calibration where nobody says how many

# Windows are drawn from the first POOL times as many as are asked for: enough to be mixed, bounded for any corpus.
POOL = 8


@dataclass(frozen=True)
class DataConfig:
    """Which text is taken, and how it becomes windows of tokens.

    Args:
        num_samples (`int`, *optional*): Sequences to take from a text source. By default 128 for calibration, and as
            many as the steps need for training.
        sequence_length (`int`, *optional*): Tokens per sequence. Defaults to the model's longest, at most 2048.
        text_column (`str`, defaults to `"text"`): The column of a dataset that holds the text.
        split (`str`, *optional*): The split of a named dataset. Defaults to `"train"`.
        seed (`int`, defaults to 0): Which sequences are taken.
    """

    num_samples: int | None = setting(None, low=1)
    sequence_length: int | None = setting(None, low=2)
    text_column: str = "text"
    split: str | None = None
    seed: int = setting(0, low=0)

    def __post_init__(self):
        check_settings(self)


DEFAULT = DataConfig()


@dataclass(frozen=True)
class Calibration:
    """Inputs that feed statistics, and where they come from.

    Attributes:
        inputs (`Mapping[str, Tensor]`): by the name that the model's forward gives them; first dimension the samples.
        source (`str`): what the user named.
        seed (`int`): which windows were drawn.
    """

    inputs: Mapping[str, Tensor]
    source: str
    seed: int | None = None

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The inputs in batches of at most `size` samples."""
        parts = {name: value.split(size) for name, value in self.inputs.items()}
        return [dict(zip(parts, values)) for values in zip(*parts.values())]

    def facts(self) -> dict[str, Any]:
        """Source, samples, length, tokens and seed."""
        samples, *rest = next(iter(self.inputs.values())).shape
        length = rest[0] if len(rest) == 1 else None
        tokens = samples * length if length else None
        return {"source": self.source, "samples": samples, "length": length, "tokens": tokens, "seed": self.seed}


def load_calibration(
    source: Any, model: nn.Module, tokenizer: Any = None, config: DataConfig = DEFAULT, **settings
) -> Calibration:
    """What `source` offers, as inputs of `model`.

    Args:
        source (`Any`): a LongTensor (samples, length) or a mapping of the model's inputs by name, both used whole; or
            a source of text as `iterate_texts` reads it, of which windows are drawn.
        config (`DataConfig`, *optional*): how many windows, how long, from which column and split, by which seed.
        settings (`dict`): those of `config`, as in releases before it was there.

    Raises:
        ValueError: too little text, no tokenizer for text, or tokens that the model does not know.
    """
    if settings:
        warnings.warn("Settings of text are a DataConfig: config=DataConfig(...).", FutureWarning, stacklevel=2)
        config = replace(config, **settings)
    main = model.main_input_name
    if isinstance(source, Tensor):
        source = {main: source}
    if isinstance(source, Mapping) and source and all(isinstance(value, Tensor) for value in source.values()):
        lengths = {len(value) for value in source.values()}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"Calibration inputs need the same number of samples, at least 1; got {sorted(lengths)}.")
        if "input_ids" in source:
            check_tokens(source["input_ids"], model)
        return Calibration({name: v.long() if name == "input_ids" else v for name, v in source.items()}, "tensor")
    if tokenizer is None:
        raise ValueError("Calibration text needs a tokenizer; pass one, or token ids of shape (samples, length).")
    tokens = load_tokens(
        source,
        tokenizer,
        num_samples=config.num_samples or SAMPLES,
        sequence_length=config.sequence_length or default_length(model),
        seed=config.seed,
        text_column=config.text_column,
        split=config.split,
    )
    check_tokens(tokens, model)
    return Calibration({"input_ids": tokens}, describe(source), config.seed)


def default_length(model: nn.Module) -> int:
    """The model's longest sequence, at most 2048."""
    config = model.config.get_text_config()
    return min(getattr(config, "max_position_embeddings", None) or 2048, 2048)


def load_tokens(
    source: Any,
    tokenizer: Any,
    *,
    num_samples: int | None = None,
    sequence_length: int = 2048,
    seed: int = 0,
    text_column: str = "text",
    split: str | None = None,
) -> Tensor:
    """Non-overlapping windows of the source's text, LongTensor (samples, sequence_length).

    Texts are joined, with the tokenizer's end-of-text token between them. With `num_samples`, that many windows are
    drawn in an order that `seed` decides; without, all windows are taken in the order of the text.

    Raises:
        ValueError: the text holds fewer windows than were asked for.
    """
    wanted = None if num_samples is None else num_samples * POOL
    windows = _windows(iterate_texts(source, text_column, split), tokenizer, sequence_length, wanted)
    needed = 1 if num_samples is None else num_samples
    if len(windows) < needed:
        raise ValueError(
            f"{describe(source)} holds {len(windows)} windows of {sequence_length} tokens, and {needed} are needed; "
            "give more text, or a smaller num_samples or sequence_length."
        )
    if num_samples is None:
        return windows
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:num_samples]]


def split_windows(windows: Tensor, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Disjoint parts of `windows`, (samples, length), of the given sizes: name -> (size, length), drawn by `seed`.

    Raises:
        ValueError: the sizes add up to more windows than there are.
    """
    if sum(sizes.values()) > len(windows):
        raise ValueError(f"{dict(sizes)} needs {sum(sizes.values())} windows, and there are {len(windows)}.")
    order = iter(torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist())
    return {name: windows[list(islice(order, size))] for name, size in sizes.items()}


def iterate_texts(source: Any, text_column: str = "text", split: str | None = None) -> Iterator[str]:
    """The texts of a source, one by one.

    A source is a list of texts; the path of a .txt (one text), .jsonl, .json or .parquet file; a `datasets` dataset;
    or the name of one: a short name (`wikitext2`, `c4`), a local folder, or a Hub repository, which is streamed.
    """
    import datasets

    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
            return
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


def _open_dataset(name: str, text_column: str, split: str | None) -> tuple[Iterable, str]:
    """The dataset behind a file or a name, and its column of text."""
    import datasets

    path = Path(name)
    builders = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if path.suffix in builders:
        if not path.is_file():
            raise FileNotFoundError(f"No such file: {name!r}.")
        return datasets.load_dataset(builders[path.suffix], data_files=name, split="train"), text_column
    if path.suffix and "/" not in name and not path.exists():
        raise FileNotFoundError(f"No such file: {name!r}.")
    if path.suffix and path.is_file():
        raise ValueError(f"Cannot read {name!r}: expected .txt, .jsonl, .json or .parquet, or the name of a dataset.")
    repository, configuration, default_split, column = DATASETS.get(name, (name, None, "train", text_column))
    try:
        data = datasets.load_dataset(repository, configuration, split=split or default_split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load the dataset {name!r}: {error}") from error
    return data, column


def _windows(texts: Iterable[str], tokenizer: Any, length: int, wanted: int | None) -> Tensor:
    """At most `wanted` windows of `length` tokens from the joined texts."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        if ids:
            ids += separator
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if wanted is not None and len(ids) >= wanted * length:
            break
    count = len(ids) // length if wanted is None else min(len(ids) // length, wanted)
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def describe(source: Any) -> str:
    """A source in a few words; a path only by its last part."""
    if isinstance(source, (str, Path)):
        return Path(source).name if Path(source).exists() else str(source)
    if isinstance(source, Sequence):
        return f"{len(source)} texts"
    return getattr(source, "info", None) and source.info.dataset_name or type(source).__name__
