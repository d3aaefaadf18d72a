"""What feeds statistics: inputs of a model, from texts, tokens or what a processor returned."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..common.frame import Frame, frame_of
from ..common.token_rows import as_tensors
from ..data import DEFAULT, SAMPLES, DataConfig, Passed, describe, load_tokens, padded_tokens, starts_with_bos
from ..model.adapters import inner_model
from ..model.examples import without_labels
from ..model.inputs import (
    check_length,
    check_takes_text,
    check_tokens,
    check_writes,
    default_length,
    kind_of,
    main_input,
)
from ..model.padding import Whole
from .batches import MEDIA, model_batches
from .pictures import picture_inputs


# Inputs that have a row for each prompt, and where configurations name the tokens that others take the place of.
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "decoder_input_ids"}
_TEXT |= {"decoder_attention_mask"}
_PLACES = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")


@dataclass(frozen=True)
class Calibration:
    """Inputs that feed statistics, and where they come from.

    Attributes:
        inputs (`Mapping[str, Tensor]`): by the name that the model's forward gives them; first dimension the samples.
        source (`str`): what the user named.
        seed (`int`): which windows were drawn.
        bos (`bool`): whether each starts with the tokenizer's beginning-of-sequence token; `None` where not known.
        notes (`Mapping[str, Any]`): what else is to be known of the source, such as rows that hold no text.
        parts (`tuple[Mapping[str, Tensor], ...]`): batches that are run as they are, each of inputs by name: prompts
            with any number of pictures each. Their tensors stand in `inputs` under names with a number.
    """

    inputs: Mapping[str, Tensor]
    source: str
    seed: int | None = None
    bos: bool | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Mapping[str, Tensor], ...] = ()

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The inputs in batches of at most `size` samples, (samples, ...) each; or the parts as they are."""
        if self.parts:
            return list(self.parts)
        parts = {name: value.split(size) for name, value in self.inputs.items()}
        return [dict(zip(parts, values)) for values in zip(*parts.values())]

    def facts(self) -> dict[str, Any]:
        """Source, samples, length, tokens, seed, and `bos` where it is known.

        Tokens are positions that an `attention_mask` does not mark as padding, wherever the padding stands.
        """
        if self.parts:
            found = [Calibration(_main_first(part), self.source).facts() for part in self.parts]
            samples, tokens = sum(each["samples"] for each in found), [each["tokens"] for each in found]
            lengths = {each["length"] for each in found}
            return {
                "source": self.source,
                "samples": samples,
                "length": lengths.pop() if len(lengths) == 1 else None,
                "tokens": None if None in tokens else sum(tokens),
                "seed": self.seed,
            }
        name, main = next(iter(_main_first(self.inputs).items()))
        flat = main.dim() == (3 if name.endswith("inputs_embeds") else 2)
        samples, length = len(main), main.shape[1] if flat else None
        mask = self.inputs.get(f"{'decoder_' if name.startswith('decoder_') else ''}attention_mask")
        padded = mask is not None and length and mask.shape == (samples, length)
        tokens = int(mask.bool().sum()) if padded else samples * length if length else None
        facts = {"source": self.source, "samples": samples, "length": length, "tokens": tokens, "seed": self.seed}
        return {**facts, **({} if self.bos is None else {"bos": self.bos}), **self.notes}


def load_calibration(
    source: Any, model: nn.Module, tokenizer: Any = None, config: DataConfig = DEFAULT, **settings
) -> Calibration:
    """What `source` offers, as inputs of `model`.

    Args:
        source (`Any`): token ids (samples, length), a mapping of the model's inputs by name, tensors or arrays, such
            as a processor returns, or a list of such mappings, all used whole; a DataLoader or dataset of them, of
            which as many samples are taken as are asked for; or a source of text, conversations or rows of token ids
            as `load_tokens` reads it, of which windows are drawn.
        config (`DataConfig`, *optional*): how many windows, how long, from which column and split, by which seed.
        settings (`dict`): those of `config`, as in releases before it was there.

    Raises:
        ValueError: too little text, no tokenizer for text, or tokens that the model does not know.
    """
    if settings:
        warnings.warn("Settings of text are a DataConfig: config=DataConfig(...).", FutureWarning, stacklevel=2)
        config = replace(config, **settings)
    takes, number = signature(inner_model(model).forward).parameters.keys(), config.num_samples or SAMPLES
    found = None
    if config.image_column is None:
        found = model_batches(source, main_input(model), takes, number, config.seed)
    if found is not None:
        _check_taken(found, model, takes)
        return replace(_of_batches([_checked(batch, model) for batch in found]), source=_described(source, found))
    source = as_tensors(source)
    if isinstance(source, Tensor):
        source = {main_input(model): source}
    if isinstance(source, Mapping) and source and all(isinstance(value, Tensor) for value in source.values()):
        batch = _checked(source, model)
        return _of_parts([batch], "tensor") if isinstance(batch, Whole) else Calibration(batch, "tensor")
    if _are_batches(source):
        return _of_batches([_checked(batch, model) for batch in source])
    if config.image_column is not None:
        found = [_checked(batch, model) for batch in picture_inputs(source, model, config)]
        return replace(_of_batches(found), source=describe(source), seed=config.seed)
    check_takes_text(model)
    length = config.sequence_length or default_length(model)
    check_length(length, model)  # before any text is read
    # A causal model's windows are cut from running text; others were trained on texts in their tokenizer's frame.
    framed = kind_of(model) != "causal" and config.bos is None and tokenizer is not None
    frame = frame_of(tokenizer) if framed else Frame()
    passed = Passed()
    if not config.packing:
        reading = replace(config.reading(), passed=passed)
        tokens, mask = padded_tokens(source, tokenizer, number, length, reading, frame, config)
        check_tokens(tokens, model)
        bos = None if passed.token_rows else starts_with_bos(tokenizer, config.bos)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        return Calibration(inputs, describe(source), config.seed, bos, passed.facts())
    tokens = load_tokens(
        source,
        tokenizer,
        num_samples=number,
        sequence_length=length - len(frame),
        seed=config.seed,
        bos=False if frame else config.bos,
        reading=replace(config.reading(), passed=passed),
        keeps_rows=config.sequence_length is None,
    )
    # Rows of token ids are what somebody has made, frame and all.
    tokens = tokens if passed.token_rows else frame.around(tokens)
    check_tokens(tokens, model)
    bos = None if passed.token_rows else starts_with_bos(tokenizer, config.bos)
    return Calibration({"input_ids": tokens}, describe(source), config.seed, bos, passed.facts())


def _check_taken(batches: Sequence[Mapping[str, Tensor]], model: nn.Module, takes: Collection[str]) -> None:
    """Raise `ValueError` where pictures or sound are no input of the model, which may pass over what it is given."""
    strange = sorted(set().union(*batches) & MEDIA.keys() - {*takes})
    if strange:
        called = type(inner_model(model)).__name__
        raise ValueError(f"The batches hold {', '.join(strange)}, and {called} has no such input.")


def _described(source: Any, batches: Sequence[Any]) -> str:
    return f"{len(batches)} batches" if isinstance(source, (list, tuple)) else describe(source)


def _main_first(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by name, (samples, ...), tokens before pictures: they tell how many samples there are, and how long."""
    return dict(sorted(inputs.items(), key=lambda item: item[0] not in ("input_ids", "inputs_embeds")))


def _are_batches(source: Any) -> bool:
    """Whether `source` is a list of inputs by name, tensors each."""
    return (
        isinstance(source, (list, tuple))
        and bool(source)
        and all(isinstance(batch, Mapping) and batch for batch in source)
        and all(isinstance(value, Tensor) for batch in source for value in batch.values())
    )


def _checked(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Inputs by name, (samples, ...), that fit the model; a `Whole` where they cannot be cut by samples."""
    if empty := [name for name, value in batch.items() if len(value) == 0]:
        raise ValueError(f"Calibration inputs need at least 1 sample; {', '.join(empty)} has none.")
    batch = without_labels(batch, model)
    check_writes(batch, model)
    for name in batch.keys() & {"input_ids", "decoder_input_ids"}:
        check_tokens(batch[name], model)
    found = {name: value.long() if name == "input_ids" else value for name, value in batch.items()}
    # Pictures and recordings come in rows of their own, beside prompts that say where they belong.
    prompts = found.keys() & _TEXT if "input_ids" in found else found.keys()
    lengths = {len(found[name]) for name in prompts}
    if len(lengths) > 1:
        raise ValueError(f"Calibration inputs need the same number of samples, at least 1; got {sorted(lengths)}.")
    if prompts == found.keys():
        return found
    # As many pictures as prompts may still be two in one prompt and none in another.
    tokens = (getattr(model.config, name, None) for name in _PLACES)
    marks = [(found["input_ids"] == token).sum(1) for token in tokens if token is not None]
    even = all(bool((mark == mark[0]).all()) for mark in marks)
    return found if even and {len(value) for value in found.values()} == lengths else Whole(found)


def _of_batches(batches: Sequence[Mapping[str, Tensor]]) -> Calibration:
    """Batches of inputs by name as one calibration: cut as asked where they are alike, else run as they are."""
    shapes = {tuple((name, value.shape[1:], value.dtype) for name, value in sorted(each.items())) for each in batches}
    source = f"{len(batches)} batches"
    if len(shapes) == 1 and not any(isinstance(batch, Whole) for batch in batches):
        return Calibration({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}, source)
    return _of_parts(batches, source)


def _of_parts(parts: Sequence[Mapping[str, Tensor]], source: str) -> Calibration:
    """Calibration on batches that are run as they are, (samples, ...) by name each."""
    named = {f"{name}[{number}]": value for number, part in enumerate(parts) for name, value in part.items()}
    return Calibration(named, source, parts=tuple(parts))
