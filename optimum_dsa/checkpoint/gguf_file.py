"""Llamas as GGUF files, for llama.cpp: plain ones, and those whose layers have widths of their own (`deci`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..common.files import read_json
from ..common.installation import how_to_install
from ..model.per_layer import TYPE
from .encodings import decoded
from .load import load_tokenizer, read_configuration
from .shards import find_shards, open_shard
from .skeleton import open_skeleton


FAMILIES = ("llama", "mistral")  # what llama.cpp computes alike
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


def write_gguf(folder: Path, path: Path, kind: str) -> int:
    """Write the checkpoint in `folder` to the file `path`, its matrices as `kind`; bytes of all tensors.

    One tensor at a time is in memory.

    Raises:
        ValueError: it cannot be said in a GGUF of these families, or the package gguf is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"A GGUF is written by the package gguf, which is not installed: {how_to_install('gguf')}."
        ) from error
    config = read_configuration(str(folder), {})
    _check(config, folder)
    widths = [_widths(own) for own in config.per_layer_config]
    plain = len(set(widths)) == 1
    arch = gguf.MODEL_ARCH.LLAMA if plain else gguf.MODEL_ARCH.DECI
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_sizes(writer, config, widths)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.ALL_F32)
    _write_tokenizer(writer, folder, config)
    names, total = gguf.get_tensor_name_map(arch, len(widths)), 0
    said = {name: tuple(tensor.shape) for name, tensor in open_skeleton(folder)[0].state_dict().items()}
    for name, tensor in _tensors(folder, config):
        if (shape := tuple(tensor.shape)) != said.get(name, shape):
            raise ValueError(
                f"{name} is {shape} in {folder}, and by its config.json it is {said[name]}: they do not belong "
                "together."
            )
        called, array = _array(name, tensor, names, widths, kind)
        total += array.nbytes
        writer.add_tensor_info(called, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in _tensors(folder, config):
        writer.write_tensor_data(_array(name, tensor, names, widths, kind)[1])
    writer.close()
    return total


def _check(config: Any, folder: Path) -> None:
    """Raise `ValueError` for what llama.cpp would compute otherwise."""
    family = config.model_type.removeprefix(TYPE)
    if family not in FAMILIES:
        raise ValueError(
            f"{folder} is a {config.model_type}; written as GGUF here are {' and '.join(FAMILIES)}, plain and with "
            "layers that differ. Of other families, llama.cpp's own convert_hf_to_gguf.py takes plain models."
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"{folder} turns positions by {kind!r}, which is not written as GGUF here.")
    for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if getattr(config, name, expected) != expected:
            raise ValueError(f"{folder} has {name}={getattr(config, name)!r}, which is not written as GGUF here.")


def _widths(own: Any) -> tuple[int, int, int]:
    """Query heads, heads of keys and values, and channels of the MLP of one layer."""
    return own.num_attention_heads, own.num_key_value_heads, own.intermediate_size


def _write_sizes(writer: Any, config: Any, widths: list[tuple[int, int, int]]) -> None:
    head, longest = config.head_dim, config.max_position_embeddings
    queries, keys, channels = ([*column] if len(set(widths)) > 1 else column[0] for column in zip(*widths))
    writer.add_name(str(config.model_type))
    writer.add_block_count(len(widths))
    # Beyond a sliding window llama.cpp would see what the model does not.
    writer.add_context_length(min(longest, getattr(config, "sliding_window", None) or longest))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(queries)
    writer.add_head_count_kv(keys)
    writer.add_feed_forward_length(channels)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tensors(folder: Path, config: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by name, dense, and those that its configuration stands for."""
    shards = find_shards(folder)
    for file in shards.files:
        with open_shard(folder / file) as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                plain = None if shards.encoding.is_plain else decoded(tensor, name)
                yield name, tensor if plain is None else plain
    if config.rope_parameters.get("rope_type") == "llama3":
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        turns = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        yield "rope_freqs.weight", config.rope_parameters["rope_theta"] ** -turns / found


def _array(name: str, tensor: Tensor, names: Any, widths: list, kind: str) -> tuple[str, np.ndarray]:
    """What llama.cpp calls a tensor, of any shape, and its numbers as they are written."""
    called = name if name.startswith("rope_freqs") else names.get_name(name, try_suffixes=(".weight", ".bias"))
    if called is None or name.endswith(".bias"):
        raise ValueError(f"{name} is no tensor that a GGUF of this family has.")
    part = name.split(".")[-2]
    if part in ("q_proj", "k_proj"):
        # The halves of a head that turn together lie beside each other there.
        heads = widths[int(name.split(".")[-4])][part == "k_proj"]
        tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
    array = tensor.float().numpy()
    return called, np.ascontiguousarray(array.astype(np.float16) if kind == "f16" and array.ndim > 1 else array)


def _write_tokenizer(writer: Any, folder: Path, config: Any) -> None:
    """Write the tokenizer of a checkpoint, where it is one of bytes that llama.cpp has a name for."""
    tokenizer = load_tokenizer(str(folder))
    if tokenizer is None or not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json, and a GGUF holds its tokenizer.")
    stated = read_json(folder / "tokenizer.json")
    split = stated.get("pre_tokenizer") or {}
    steps = tuple(
        step.get("pattern", {}).get("Regex", step["type"]) for step in split.get("pretokenizers", [split]) if step
    )
    if stated["model"]["type"] != "BPE" or stated["model"].get("byte_fallback") or steps not in _SPLITS:
        raise ValueError(
            f"The tokenizer of {folder} is written as GGUF only where it is one of bytes that splits text as GPT-2's, "
            f"SmolLM's, Llama 3's or Qwen 2's does; it is a {stated['model']['type']} after {' and '.join(steps)}."
        )
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {number: row.special for number, row in tokenizer.added_tokens_decoder.items()}
    tokens = [known.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    normal, control, own, unused = 1, 3, 4, 5
    kinds = [
        unused if number not in known else normal if number not in added else control if added[number] else own
        for number in range(config.vocab_size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_SPLITS[steps])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in stated["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        number = getattr(config, f"{name}_token_id", None) if number is None else number
        number = number[0] if isinstance(number, list) else number
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begun = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begun and tokenizer.bos_token_id is not None)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())
