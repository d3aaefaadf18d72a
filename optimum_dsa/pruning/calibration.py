"""What feeds statistics: inputs of a model, from texts, tokens or what a processor returned."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..common.frame import Frame, frame_of
from ..data import DEFAULT, SAMPLES, DataConfig, describe, load_tokens, starts_with_bos
from ..model.inputs import check_length, check_takes_text, check_tokens, default_length, kind_of, main_input


@dataclass(frozen=True)
class Calibration:
    """Inputs that feed statistics, and where they come from.

    Attributes:
        inputs (`Mapping[str, Tensor]`): by the name that the model's forward gives them; first dimension the samples.
        source (`str`): what the user named.
        seed (`int`): which windows were drawn.
        bos (`bool`): whether each starts with the tokenizer's beginning-of-sequence token; `None` where not known.
    """

    inputs: Mapping[str, Tensor]
    source: str
    seed: int | None = None
    bos: bool | None = None

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The inputs in batches of at most `size` samples, (samples, ...) each."""
        parts = {name: value.split(size) for name, value in self.inputs.items()}
        return [dict(zip(parts, values)) for values in zip(*parts.values())]

    def facts(self) -> dict[str, Any]:
        """Source, samples, length, tokens, seed, and `bos` where it is known.

        Tokens are positions that an `attention_mask` does not mark as padding, wherever the padding stands.
        """
        name, main = next(iter(self.inputs.items()))
        flat = main.dim() == (3 if name.endswith("inputs_embeds") else 2)
        samples, length = len(main), main.shape[1] if flat else None
        mask = self.inputs.get(f"{'decoder_' if name.startswith('decoder_') else ''}attention_mask")
        padded = mask is not None and length and mask.shape == (samples, length)
        tokens = int(mask.bool().sum()) if padded else samples * length if length else None
        facts = {"source": self.source, "samples": samples, "length": length, "tokens": tokens, "seed": self.seed}
        return facts if self.bos is None else {**facts, "bos": self.bos}


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
    if isinstance(source, Tensor):
        source = {main_input(model): source}
    if isinstance(source, Mapping) and source and all(isinstance(value, Tensor) for value in source.values()):
        lengths = {len(value) for value in source.values()}
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(f"Calibration inputs need the same number of samples, at least 1; got {sorted(lengths)}.")
        for name in source.keys() & {"input_ids", "decoder_input_ids"}:
            check_tokens(source[name], model)
        return Calibration({name: v.long() if name == "input_ids" else v for name, v in source.items()}, "tensor")
    check_takes_text(model)
    length = config.sequence_length or default_length(model)
    check_length(length, model)  # before any text is read
    if tokenizer is None:
        raise ValueError("Calibration text needs a tokenizer; pass one, or token ids of shape (samples, length).")
    # A causal model's windows are cut from running text; others were trained on texts in their tokenizer's frame.
    framed = kind_of(model) != "causal" and config.bos is None
    frame = frame_of(tokenizer) if framed else Frame()
    tokens = load_tokens(
        source,
        tokenizer,
        num_samples=config.num_samples or SAMPLES,
        sequence_length=length - len(frame),
        seed=config.seed,
        text_column=config.text_column,
        split=config.split,
        bos=False if frame else config.bos,
    )
    tokens = frame.around(tokens)
    check_tokens(tokens, model)
    return Calibration({"input_ids": tokens}, describe(source), config.seed, starts_with_bos(tokenizer, config.bos))
