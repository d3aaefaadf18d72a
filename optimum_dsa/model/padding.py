"""Padding: cut off before anything runs, and what is left of it between tokens told apart from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class Whole(dict):
    """Inputs by name that cannot be cut by samples: those of pictures have rows of their own, several a prompt."""


def is_whole(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch is run in one piece: it says so, or its inputs have no common number of samples."""
    return isinstance(batch, Whole) or len({len(value) for value in batch.values()}) > 1


def sample_count(batch: Mapping[str, Tensor]) -> int:
    """Sequences of a batch: prompts where there are any, whatever the number of pictures in them."""
    names = ("input_ids", "inputs_embeds", "decoder_input_ids")
    return len(next((batch[name] for name in names if name in batch), next(iter(batch.values()))))


def without_padding(batch: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """The batch as batches of sequences of one length, without the padding on either side that its masks mark.

    Inputs are (samples, length, ...), masks (samples, length).
    """
    if is_whole(batch):  # padding is left in it, and told apart from tokens
        return [batch]
    parts = [batch]
    for side in ("", "decoder_"):
        parts = [cut for part in parts for cut in _cut(part, side)]
    return parts


def _cut(batch: Mapping[str, Tensor], side: str) -> Iterator[Mapping[str, Tensor]]:
    """Parts of a batch, (samples, length, ...) each, whose samples are padded alike, without this side's padding.

    Whatever the mask runs along is cut, be it token ids, embeddings or the samples of a recording.
    """
    mask = batch.get(f"{side}attention_mask")
    along = [] if mask is None or mask.dim() != 2 else _masked(batch, side, mask)
    if not along or mask.bool().all():
        yield batch
        return
    # Samples of one extent stay one batch: the fewer there are, the fewer forward passes.
    samples: dict[tuple[int, int], list[int]] = {}
    for sample, positions in enumerate(mask.bool()):
        if len(kept := positions.nonzero()):
            samples.setdefault((int(kept[0]), int(kept[-1]) + 1), []).append(sample)
    if not samples:
        raise ValueError(f"The {side}attention_mask marks every token of a batch as padding.")
    for (start, stop), chosen in samples.items():
        part = {name: value[chosen] for name, value in batch.items()}
        for name in (*along, f"{side}attention_mask"):
            part[name] = part[name][:, start:stop]
        yield part


def _masked(batch: Mapping[str, Tensor], side: str, mask: Tensor) -> list[str]:
    """Names of the inputs of one side that the mask, (samples, length), runs along, without the mask itself."""
    return [
        name
        for name, value in batch.items()
        if name.startswith("decoder_") == bool(side)
        and name != f"{side}attention_mask"
        and value.shape[:2] == mask.shape
    ]


def real_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """(samples, length) bool where padding is left between tokens; `None` where it was at the ends, and is cut off."""
    for side in ("", "decoder_"):
        mask = batch.get(f"{side}attention_mask")
        if mask is None or mask.dim() != 2 or mask.bool().all() or not _masked(batch, side, mask):
            continue
        # A decoder reads its own tokens and, in cross-attention, those of the encoder, of another length.
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"The {side}attention_mask has holes between tokens, and which statistics they belong to cannot be "
                "told in an encoder-decoder; give sequences that are padded at their ends only."
            )
        return mask.bool()
    return None
