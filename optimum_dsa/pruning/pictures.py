"""Rows of a dataset, pictures with or without text, as a model's processor makes inputs of them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor

from ..common.open_dataset import open_dataset, row_count
from ..common.slices import Slice, parse_split
from ..data import POOL, SAMPLES, DataConfig, is_mixture
from ..model.adapters import inner_model
from ..model.inputs import default_length, inputs_of


logger = logging.getLogger(__name__)

FEW = 1 << 20  # rows of a folder that are looked at: their pictures stay on the disk until one is drawn


def picture_inputs(
    source: Any, model: nn.Module, config: DataConfig, processor: Any = None
) -> list[Mapping[str, Tensor]]:
    """What the model's processor makes of rows of `source`: inputs by name, one row each.

    `config.image_column` holds the pictures, `config.text_column`, where there is one, what is said of them. Rows are
    drawn by `config.seed` from the whole of a folder, else from the first 8 times as many as are asked for.

    Args:
        source (`Any`): a dataset, its name, or a folder of pictures, with a `metadata.jsonl` or `metadata.csv` where
            there is text.
        processor (`Any`, *optional*): by default the one that lies beside the model.

    Raises:
        ValueError: no processor, no such dataset or column, or too few rows.
    """
    import datasets

    if is_mixture(source):
        raise ValueError("Pictures are read from one dataset; leave the others out, or image_column.")
    if "pixel_values" not in inspect.signature(inner_model(model).forward).parameters:
        raise ValueError(f"{type(model).__name__} reads no pictures; leave image_column out, to calibrate it on text.")
    processor = processor or processor_of(model)
    wanted, column = config.num_samples or SAMPLES, config.image_column
    decoder, rows = datasets.Image(), []
    with ExitStack() as stack:
        for data, part, count in _datasets(source, config, stack):
            columns = getattr(data, "column_names", None) or []
            if columns and column not in columns:
                raise ValueError(f"The dataset has no column {column!r} of pictures; it has {', '.join(columns)}.")
            data = data.cast_column(column, datasets.Image(decode=False))
            rows += islice(part.of(data, count), FEW if _is_local(source) else wanted * POOL)
    if len(rows) < wanted:
        raise ValueError(
            f"{source} holds {len(rows)} pictures, and {wanted} are needed; give more, or a smaller num_samples."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[:wanted].tolist()
    chosen = [rows[number] for number in order]
    room = config.sequence_length or default_length(model)
    found, cut = [], 0
    for row in chosen:
        picture = decoder.decode_example(_placed(row[column], source)).convert("RGB")
        inputs, was_cut = _inputs(model, processor, picture, row.get(config.text_column), room)
        found, cut = [*found, inputs], cut + was_cut
    if cut:
        logger.warning("%d of %d texts beside pictures are longer than %d tokens and were cut.", cut, wanted, room)
    return found


def _is_local(source: Any) -> bool:
    return isinstance(source, (str, Path)) and Path(source).exists()


def _datasets(source: Any, config: DataConfig, stack: ExitStack) -> Iterator[tuple[Any, Slice, Callable[[], int]]]:
    """Datasets to take rows from: what to take of each, and what counts its rows."""
    import datasets

    if not isinstance(source, (str, Path)):
        yield source, Slice("train"), lambda: len(source)
        return
    name, path = str(source), Path(source)
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(path.suffix.lower())
    for part in parse_split(config.split or "train"):
        if path.is_file() and kind:
            try:
                data = datasets.load_dataset(kind, data_files=str(path), split=part.name, streaming=True)
            except Exception as error:  # noqa: BLE001 - a dataset's loader may raise anything
                raise ValueError(f"Cannot load the dataset {name!r}: {' '.join(str(error).split())}") from error
        else:
            data = open_dataset(name, name, config.subset, part.name, part.name if config.split else None, stack)
        yield data, part, partial(row_count, data, part.name, path.exists())


def _placed(picture: dict[str, Any], source: Any) -> dict[str, Any]:
    """A picture that is a path, from the working folder or else from that of the file in which it stands."""
    path = picture.get("path")
    if picture.get("bytes") is None and path and not Path(path).exists() and _is_local(source):
        return {**picture, "path": str(Path(source).parent / path)}
    return picture


def processor_of(model: nn.Module) -> Any:
    """The processor that lies beside the model, where it was loaded from."""
    place = getattr(model.config, "name_or_path", "")
    try:
        return AutoProcessor.from_pretrained(place)
    except Exception as error:  # noqa: BLE001 - of a processor that is broken there are many kinds
        why = " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} needs the processor beside it to read pictures, and there is none that loads at "
            f"{place!r}: {why:.200}"
        ) from None


def _inputs(
    model: nn.Module, processor: Any, picture: Any, text: str | None, room: int
) -> tuple[dict[str, Tensor], bool]:
    """What the processor makes of one picture, and of a text where the model reads one; whether that was cut."""
    cut = False
    if inputs_of(model).main == "pixel_values" and not hasattr(processor, "tokenizer"):
        found = processor(images=[picture], return_tensors="pt")
    elif getattr(processor, "chat_template", None):
        said = [{"type": "image", "image": picture}, {"type": "text", "text": text or ""}]
        talk = [{"role": "user", "content": said}]
        found = processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
    else:
        # without a template a text says itself where the picture is, or that stands in front
        mark = getattr(processor, "image_token", None)
        text = text or ""
        text = text if mark is None or mark in text else f"{mark}\n{text}"
        options = {}
        if mark is None:  # a mark stands for many tokens, of which none may be missing
            cut = len(processor.tokenizer(text, verbose=False)["input_ids"]) > room
            options = {"truncation": True, "max_length": room} if cut else {}
        found = processor(images=[picture], text=[text], return_tensors="pt", **options)
    ids = found.get("input_ids")
    if isinstance(ids, Tensor) and not ids.numel() or isinstance(ids, list) and not any(ids):
        raise ValueError(
            f"{type(model).__name__} reads a text beside each picture, and a row has none; name the column of texts "
            "with text_column."
        )
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}, cut
