"""Windows of tokens as examples that a model is trained and judged on: its inputs, and labels of what it predicts.

A causal model predicts every next token; a masked one those that were masked; a sequence-to-sequence model reads the
first half of a window and writes the second. Other models predict no tokens: text gives them neither a loss nor a
measure, and they are refused in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import inner_model
from .calls import feed
from .inputs import KINDS, check_takes_text, kind_of, word_embeddings


REFERENCE = "https://arxiv.org/abs/1810.04805"  # of masking
IGNORED = -100  # a label that counts for nothing, as everywhere in transformers

# The share of tokens that are predicted, and how many of those are masked, exchanged and left as they are.
PREDICTED, MASKED, EXCHANGED = 0.15, 0.8, 0.1

# What a perplexity is of, where it is not of every next token.
PREDICTS = {
    "causal": None,
    "masked": "masked tokens",
    "sequence-to-sequence": "second halves, the first ones read",
}


def check_predicts_tokens(model: nn.Module, tokenizer: Any = None, what: str = "measure") -> str:
    """The model's kind; raises `ValueError` for one that predicts no tokens, so that a text gives it no loss."""
    kind, called = kind_of(model), type(inner_model(model)).__name__
    if kind not in PREDICTS:
        own = {"measure": "measure it by its own task", "train": "train it on its own task, with DSACallback beside"}
        raise ValueError(f"{called} {KINDS[kind]}, so there is no loss of it on a text; {own[what]}.")
    if kind == "masked" and getattr(tokenizer, "mask_token_id", None) is None:
        name = "None" if tokenizer is None else type(tokenizer).__name__
        raise ValueError(f"{called} predicts masked tokens, and its tokenizer ({name}) has no mask token.")
    check_takes_text(model)
    return kind


@torch.no_grad()
def check_causal(model: nn.Module, tokens: Tensor) -> None:
    """Raise `ValueError` where what `model` predicts depends on later ones of its `tokens`, (samples, length) int64.

    Such a model sees what it is to predict, and its perplexity means nothing: a BERT with a causal head that was not
    made a decoder, a model that denoises.
    """
    # By what it does: of classes and configurations that say so there is no list.
    rows = tokens[:1, :16].repeat(2, 1)
    rows[1, -1] = rows[0, 0] if rows[0, 0] != rows[0, -1] else (rows[0, -1] + 1) % _vocabulary(model, int(rows.max()))
    training = model.training
    model.eval()
    try:
        logits = feed(model, {"input_ids": rows}).logits.float()
    finally:
        model.train(training)
    change = (logits[0] - logits[1]).abs().amax(-1)
    # rounding, which a mixture's way of putting tokens together may differ by, is no sight of the future
    allowed = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.02
    if len(change) > 1 and change[:-1].max() > allowed * change[-1]:
        raise ValueError(
            f"{type(inner_model(model)).__name__} sees the tokens behind the one that it is to predict, so its "
            "perplexity on a text means nothing; load it as a decoder (is_decoder=True) if it is one."
        )


def examples(model: nn.Module, windows: Tensor, tokenizer: Any = None, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `model` and "labels", each (samples, ...), of `windows`, (samples, length) int64.

    Raises:
        ValueError: the model predicts no tokens, or has no mask token and needs one.
    """
    kind = check_predicts_tokens(model, tokenizer, "train")
    if kind == "masked":
        return _masked(windows, tokenizer, _vocabulary(model, int(windows.max())), seed)
    if kind == "sequence-to-sequence":
        half = windows.shape[1] // 2
        return {"input_ids": windows[:, :half].contiguous(), "labels": windows[:, half:].contiguous()}
    return {"input_ids": windows, "labels": windows}


def _masked(windows: Tensor, tokenizer: Any, vocabulary: int, seed: int) -> dict[str, Tensor]:
    """A share of every window's tokens, (samples, length) int64, to be predicted: at least one, no special ones.

    Devlin et al., 2018, https://arxiv.org/abs/1810.04805, section 3.1.
    """
    # By the window and not by the step: a resumed training sees what an uninterrupted one sees.
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(windows.shape, generator=generator).masked_fill(specials(windows, tokenizer), 2.0)
    number = (PREDICTED * (order < 2).sum(1)).round().clamp_min(1)[:, None]
    chosen = (order.argsort(1).argsort(1) < number) & (order < 2)
    fate = torch.rand(windows.shape, generator=generator)
    other = torch.randint(vocabulary, windows.shape, generator=generator)
    inputs = windows.masked_fill(chosen & (fate < MASKED), tokenizer.mask_token_id)
    inputs = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + EXCHANGED), other, inputs)
    return {"input_ids": inputs, "labels": windows.masked_fill(~chosen, IGNORED)}


def specials(windows: Tensor, tokenizer: Any) -> Tensor:
    """Where `windows`, (samples, length) int64, hold a special token of the tokenizer, which nobody has to guess."""
    return torch.isin(windows, torch.tensor(sorted(tokenizer.all_special_ids), dtype=windows.dtype))


def without_labels(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Inputs by name, (samples, ...), with what a decoder reads in the place of "labels", (samples, length) int64.

    A model learns from labels and computes nothing else of them, unless it writes a second sequence: then its decoder
    reads them shifted by one, and those that count for nothing are padding.
    """
    found = {name: value for name, value in batch.items() if name != "labels"}
    labels, config = batch.get("labels"), inner_model(model).config
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & found.keys()
    if labels is None or labels.dim() != 2 or given or not config.is_encoder_decoder:
        return found
    own = getattr(inner_model(model), "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        found["decoder_input_ids"] = own(labels)
    else:
        padding = config.pad_token_id or 0
        start = padding if config.decoder_start_token_id is None else config.decoder_start_token_id
        shifted = functional.pad(labels[:, :-1], (1, 0), value=start)
        found["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, padding)
    if (labels == IGNORED).any():
        found["decoder_attention_mask"] = (labels != IGNORED).long()
    return found


def logits_of(output: Any) -> Tensor:
    """Predictions, (samples, length, vocabulary), in a model's output."""
    found = getattr(output, "logits", None)
    return output.prediction_logits if found is None else found  # a model for pretraining has two heads


def run_examples(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's predictions for examples, (samples, length, vocabulary): where `batch` has labels, of those."""
    # Where a second sequence is written, its labels are what it is read from; elsewhere they would cost a loss.
    writes = model.config.is_encoder_decoder
    return logits_of(feed(model, batch if writes else {k: v for k, v in batch.items() if k != "labels"}))


def _vocabulary(model: nn.Module, highest: int) -> int:
    """How many words the model knows; of a table that does not say, as many as were seen."""
    return getattr(word_embeddings(model), "num_embeddings", highest + 1)
