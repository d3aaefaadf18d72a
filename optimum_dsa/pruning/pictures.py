"""Rows of a dataset, pictures with or without text, as a model's processor makes inputs of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor

from ..data import POOL, SAMPLES, DataConfig
from ..model.inputs import inputs_of


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

    processor = processor or processor_of(model)
    wanted, column, data = config.num_samples or SAMPLES, config.image_column, source
    local = isinstance(source, (str, Path)) and Path(source).is_dir()
    if isinstance(source, (str, Path)):
        try:
            data = datasets.load_dataset(str(source), split=config.split or "train", streaming=True)
        except Exception as error:  # noqa: BLE001 - a dataset's loader may raise anything
            raise ValueError(f"Cannot load the dataset {str(source)!r}: {' '.join(str(error).split())}") from error
    columns = getattr(data, "column_names", None) or []
    if column not in columns:
        raise ValueError(f"The dataset has no column {column!r} of pictures; it has {', '.join(columns)}.")
    decoder = datasets.Image()
    rows = list(islice(data.cast_column(column, datasets.Image(decode=False)), FEW if local else wanted * POOL))
    if len(rows) < wanted:
        raise ValueError(
            f"{source} holds {len(rows)} pictures, and {wanted} are needed; give more, or a smaller num_samples."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[:wanted].tolist()
    chosen = ((decoder.decode_example(rows[n][column]).convert("RGB"), rows[n].get(config.text_column)) for n in order)
    return [_inputs(model, processor, picture, text) for picture, text in chosen]


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


def _inputs(model: nn.Module, processor: Any, picture: Any, text: str | None) -> dict[str, Tensor]:
    """What the processor makes of one picture, and of a text where the model reads one."""
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
        found = processor(images=[picture], text=[text], return_tensors="pt")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
