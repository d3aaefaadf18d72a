"""What a model takes: its main input, what it predicts from it, and how long a sequence may be. Asked before any work.

    found = inputs_of(model)     # of a model in memory, on the device "meta" too; PEFT's wrapper is looked through
    found.main                   # "input_ids", "pixel_values", "input_features", "input_values", ...
    found.kind                   # a row of KINDS: "causal", "masked", "sequence-to-sequence", "classifier",
                                 # "embedder", "speech", "vision"
    found.longest, found.hard    # tokens of the longest usable sequence, or None; whether a longer one fails
    found.takes_text             # whether text alone is an input

`check_tokens`, `check_length` and `check_takes_text` raise one line where an input does not fit, `default_length` is
the length where nobody says one, and `word_embeddings` finds the table of words also where transformers does not.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from .adapters import inner_model


logger = logging.getLogger(__name__)

# Kind -> what such a model does, for errors.
KINDS = {
    "causal": "predicts the next token",
    "masked": "predicts masked tokens",
    "sequence-to-sequence": "writes a second sequence",
    "classifier": "predicts labels and no tokens",
    "embedder": "gives hidden states and predicts no tokens",
    "speech": "reads sound",
    "vision": "reads pictures",
}
# Kind -> the tables of transformers' Auto classes whose classes are of it; asked in this order.
_TABLES = {
    "causal": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_CAUSAL_LM"),
    "masked": ("MODEL_FOR_MASKED_LM",),
    "classifier": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION",
        "MODEL_FOR_TOKEN_CLASSIFICATION",
        "MODEL_FOR_QUESTION_ANSWERING",
        "MODEL_FOR_MULTIPLE_CHOICE",
        "MODEL_FOR_NEXT_SENTENCE_PREDICTION",
        "MODEL_FOR_TABLE_QUESTION_ANSWERING",
    ),
}
# Where configurations say how long a sequence may be, apart from max_position_embeddings: MPT, Whisper's decoder, LED,
# and what models that bring their own code call it.
_LENGTHS = (
    "max_seq_len",
    "max_target_positions",
    "max_decoder_position_embeddings",
    "max_encoder_position_embeddings",
)
_LENGTHS += ("max_seq_length", "max_sequence_length", "seq_length", "n_positions", "n_ctx", "block_size")


@dataclass(frozen=True)
class ModelInputs:
    """What a model takes.

    Attributes:
        main: name of its main input.
        kind: a row of `KINDS`.
        longest: tokens of the longest sequence; `None` where there is no limit, or nobody says.
        hard: whether a longer one fails; otherwise positions are stretched beyond what the model was made for.
        takes_text: whether text alone is an input.
    """

    main: str
    kind: str
    longest: int | None = None
    hard: bool = False
    takes_text: bool = True


def inputs_of(model: nn.Module) -> ModelInputs:
    """What `model` takes; no weight is read."""
    kind = kind_of(model)
    return ModelInputs(main_input(model), kind, *_longest(model), takes_text=kind not in ("speech", "vision"))


def main_input(model: nn.Module) -> str:
    """The name of the model's main input."""
    return getattr(inner_model(model), "main_input_name", "input_ids")


def kind_of(model: nn.Module) -> str:
    """The row of `KINDS`: by the tables of transformers' Auto classes, else by what the model can do."""
    model = inner_model(model)
    main = main_input(model)
    if main != "input_ids":
        return "vision" if "pixel" in main else "speech"
    generates = bool(getattr(model, "can_generate", bool)())
    head = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and (generates or head):
        return "sequence-to-sequence"
    # A class of a user's own is of the kind of the one that it is made from.
    names = [cls.__name__ for cls in type(model).__mro__]
    found = [kind for kind, tables in _TABLES.items() if any(_in_table(name, tables) for name in names)]
    if found == ["causal", "masked"]:  # XLM and Flaubert are both, by their configuration
        config = model.config
        return "causal" if getattr(config, "is_decoder", False) or getattr(config, "causal", False) else "masked"
    if found:
        return found[0]
    if not generates and "pixel_values" in inspect.signature(model.forward).parameters:
        return "vision"  # CLIP and its like: text is half of what they read
    return "causal" if generates else "masked" if head else "embedder"


def _in_table(name: str, tables: tuple[str, ...]) -> bool:
    """Whether an Auto class of one of the tables takes the class of this name."""
    rows = (getattr(modeling_auto, f"{table}_MAPPING_NAMES", {}).values() for table in tables)
    return any(name in ((names,) if isinstance(names, str) else names) for table in rows for names in table)


def _longest(model: nn.Module) -> tuple[int | None, bool]:
    """Tokens of the longest usable sequence, if there is a limit, and whether a longer one fails."""
    model = inner_model(model)
    stated, named = _stated(model)
    if stated is None:
        return None, False
    # A table of positions, of one row each; rotary and relative positions have no table.
    words, usable = word_embeddings(model), []
    for part in model.modules():
        if isinstance(part, nn.Embedding) and part is not words and stated <= part.num_embeddings <= stated + 2:
            # OPT and BART leave the first rows out; RoBERTa's family counts from behind the row of padding.
            skipped = getattr(part, "offset", 0) or (0 if part.padding_idx is None else part.padding_idx + 1)
            usable.append(part.num_embeddings - skipped)
    tables = [buffer for buffer in model.buffers() if buffer.dim() in (2, 4) and buffer.shape[-2] == stated]
    # GPT-J's table of sines, and masks of fixed size, are buffers of (positions, ...) or (1, 1, positions, positions).
    fixed = any(buffer.dim() == 2 or buffer.shape[-1] == stated for buffer in tables)
    return min([stated, *usable]), bool(usable) or fixed or named != "max_position_embeddings"


def _stated(model: nn.Module) -> tuple[int | None, str]:
    """The most tokens that the configuration speaks of, of encoder and decoder the fewer, and its name there."""
    config, found = getattr(model, "config", None), []
    for part in (text_config(model), getattr(config, "encoder", None), getattr(config, "decoder", None)):
        numbers = {name: getattr(part, name, None) for name in ("max_position_embeddings", *_LENGTHS)}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int) and value > 0}
        # what the others say beside it is of something else, such as what it was trained with
        first = {name: value for name, value in numbers.items() if name == "max_position_embeddings"}
        found += [(value, name) for name, value in (first or numbers).items()]
    return min(found, default=(None, ""))


def text_config(model: nn.Module) -> Any:
    """The configuration of the text that a model reads or writes, or its own."""
    return text_part(getattr(inner_model(model), "config", None))


def text_part(config: Any) -> Any:
    """The part of a model's configuration that says how it reads or writes text, or the whole of one without parts."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # ValueError: an encoder and a decoder have one each
        return config


def own_settings_of(model: nn.Module) -> None:
    """Give a model settings of its own, equal to those that it may share with models made from the same, in place."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name == "config" or isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, copies))


def word_embeddings(model: nn.Module) -> nn.Module | None:
    """The table of the words that a model reads; `None` where it has none that can be told."""
    for part in _text_parts(inner_model(model)):
        try:
            found = part.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # CLIP has towers, and no embeddings of its own
            continue
        if found is not None:
            return found
    return None


def _text_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The model, then its submodules that carry the text's configuration, the outermost first."""
    yield model
    config = text_config(model)
    yield from (part for part in model.modules() if part is not model and getattr(part, "config", None) is config)


def default_length(model: nn.Module) -> int:
    """The model's longest sequence, at most 2048."""
    # At 2048 most published perplexities of pruned models are measured.
    return min(_longest(model)[0] or 2048, 2048)


def check_takes_text(model: nn.Module) -> None:
    """Raise `ValueError` for a model that reads pictures or sound: text alone is no input of it."""
    found = inputs_of(model)
    if not found.takes_text:
        also = " and pixel_values" if found.main == "input_ids" else ""
        raise ValueError(
            f"{_called(model)} {KINDS[found.kind]} ({found.main}{also}), and text alone is no input of it; give what "
            "its processor or feature extractor returns, as a mapping of its inputs."
        )


def check_writes(batch: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise `ValueError` where a model reads sound or pictures and writes text, and `batch` has no text to be written.

    What its decoder reads then is nowhere: a processor gives what is heard or seen. `batch` is inputs by name.
    """
    inner = inner_model(model)
    reads = {"decoder_input_ids", "decoder_inputs_embeds"} & inspect.signature(inner.forward).parameters.keys()
    if main_input(model) == "input_ids" or not reads or not inner.config.is_encoder_decoder or reads & batch.keys():
        return
    raise ValueError(
        f"{_called(model)} writes text of {main_input(model)}, and calibration needs that text as well; add labels, "
        "the tokens of what is said or seen, or decoder_input_ids, such as its generate() gives."
    )


def check_tokens(tokens: Tensor, model: nn.Module) -> None:
    """Raise `ValueError` unless `tokens` are (samples, length) whole numbers within the model's vocabulary."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        got = f"{tuple(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"Tokens are a LongTensor (samples, length), not empty; got {got}.")
    # Held against the model here: an index out of range ends a process on a GPU with an assertion of CUDA.
    vocabulary = getattr(word_embeddings(model), "num_embeddings", None)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"Tokens run from {low} to {high}, but {_called(model)} knows 0 to {(vocabulary or 0) - 1}: "
            "were they made with another tokenizer?"
        )
    check_length(tokens.shape[1], model)


def check_length(length: int, model: nn.Module) -> None:
    """Raise `ValueError` for sequences longer than `model` has positions for; warn where it may stretch them."""
    longest, hard = _longest(model)
    if longest is None or length <= longest:
        return
    if hard:
        raise ValueError(
            f"{_called(model)} takes at most {longest} tokens, and these sequences have {length}; "
            f"use sequence_length={longest}."
        )
    logger.warning("%s was made for %d tokens, and these sequences have %d.", _called(model), longest, length)


def _called(model: nn.Module) -> str:
    return type(inner_model(model)).__name__
