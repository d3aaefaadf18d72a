"""Tokenizers in the words of llama.cpp: those that merge bytes, and SentencePiece's that merge characters by score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .load import load_tokenizer


# How a tokenizer of bytes splits text before it merges -> what llama.cpp calls that.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA3, "ByteLevel"): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""), "ByteLevel"): "qwen2",
}
_SPACE = "\u2581"  # what SentencePiece writes for a space
_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = range(1, 7)  # kinds of tokens there


def write_tokenizer(writer: Any, folder: Path, config: Any) -> None:
    """Write the tokenizer of the checkpoint in `folder`, to gguf's writer.

    Raises:
        ValueError: there is none, or none that llama.cpp has.
    """
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None or not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"{folder} has no tokenizer.json, and a GGUF holds its tokenizer.")
    # What is used, and not the file: transformers makes some tokenizers anew from its vocabulary and merges.
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    model, known = stated["model"], {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [known.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    kinds = _kinds(tokenizer, known, config.vocab_size, model)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        # Its own spaces are matched as they stand in a text.
        tokens = [one.replace(_SPACE, " ") if kind == _OWN else one for one, kind in zip(tokens, kinds)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, model, folder))
        writer.add_add_space_prefix(_begins_with_space(stated, folder))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(stated, folder))
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    # Of what is named so, llama.cpp looks these tokens up, whose spaces behind them are theirs.
    is_phi3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= tokenizer.get_vocab().keys()
    name = str(config.model_type)
    writer.add_name(name if is_phi3 else name.replace("phi3", "phi"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_marks(writer, tokenizer, config)


def _kinds(tokenizer: Any, known: Mapping[int, str], size: int, model: Mapping[str, Any]) -> list[int]:
    """What each of `size` tokens is."""
    added = {number: row.special for number, row in tokenizer.added_tokens_decoder.items()}
    whole = bool(model.get("byte_fallback"))  # tokens that stand for single bytes are written as such

    def kind(number: int) -> int:
        token = known.get(number)
        if token is None:
            return _UNUSED
        if whole and token == (model.get("unk_token") or "<unk>"):
            return _UNKNOWN
        if number in added:
            return _CONTROL if added[number] else _OWN
        return _BYTE if whole and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else _NORMAL

    return [kind(number) for number in range(size)]


def _merges(model: Mapping[str, Any]) -> list[Sequence[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _scores(tokens: Sequence[str], model: Mapping[str, Any], folder: Path) -> list[float]:
    """The score by which each of `tokens` is merged: the sooner the higher.

    Raises:
        ValueError: merges are no order of tokens, such as a score for each gives.
    """
    vocabulary, ranks, last = model["vocab"], {}, None
    pairs = {(left, right) for left, right in _merges(model)}
    for left, right in _merges(model):
        if left + right != last and left + right in ranks:
            raise ValueError(_no_scores(folder, f"{left + right!r} is merged at two times"))
        last = left + right
        ranks.setdefault(last, len(ranks))
    # llama.cpp merges any two that are a token together.
    for token in ranks:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in pairs:
                raise ValueError(_no_scores(folder, f"{left!r} and {right!r} are not merged to {token!r}"))
    return [-float(ranks.get(token.replace(" ", _SPACE), len(ranks))) for token in tokens]


def _no_scores(folder: Path, why: str) -> str:
    return (
        f"The tokenizer of {folder} writes bytes for what it does not know, as SentencePiece's do, and has merges "
        f"that no scores give ({why}); llama.cpp's own convert_hf_to_gguf.py takes its tokenizer.model."
    )


def _begins_with_space(stated: Mapping[str, Any], folder: Path) -> bool:
    """Whether a tokenizer like SentencePiece's puts a space before a text."""
    steps = [stated.get("normalizer"), stated.get("pre_tokenizer")]
    steps = [part for step in steps if step for part in step.get("normalizers", step.get("pretokenizers", [step]))]
    prefixed = False
    for step in steps:
        kind, pattern = step["type"], (step.get("pattern") or {}).get("String")
        if kind == "Metaspace" and not step.get("split"):
            prefixed |= step["prepend_scheme"] != "never"
        elif kind == "Prepend" and step["prepend"] == _SPACE:
            prefixed = True
        # the last one splits at spaces, of which there are none by then
        elif not (kind == "Replace" and pattern == " " and step["content"] == _SPACE) and not (
            kind == "Split" and pattern == " "
        ):
            raise ValueError(
                f"The tokenizer of {folder} is written as GGUF only where it changes nothing but spaces before it "
                f"merges, as SentencePiece's do here; it has a {kind}."
            )
    return prefixed


def _split(stated: Mapping[str, Any], folder: Path) -> str:
    """What llama.cpp calls the way in which a tokenizer of bytes splits text."""
    split = stated.get("pre_tokenizer") or {}
    steps = tuple(
        step.get("pattern", {}).get("Regex", step["type"]) for step in split.get("pretokenizers", [split]) if step
    )
    if stated["model"]["type"] != "BPE" or steps not in _SPLITS:
        raise ValueError(
            f"The tokenizer of {folder} is written as GGUF only where it is SentencePiece's, or one of bytes that "
            f"splits text as GPT-2's, SmolLM's, Llama 3's or Qwen 2's does; it is a {stated['model']['type']} after "
            f"{' and '.join(steps)}."
        )
    return _SPLITS[steps]


def _write_marks(writer: Any, tokenizer: Any, config: Any) -> None:
    """Write which tokens begin, end and fill a text, whether the first is added, and how chats are written."""
    for name in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        number = getattr(config, f"{name}_token_id", None) if number is None else number
        number = number[0] if isinstance(number, list) else number
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begun = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begun and tokenizer.bos_token_id is not None)
    # llama.cpp adds one by itself after some tokenizers
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())
