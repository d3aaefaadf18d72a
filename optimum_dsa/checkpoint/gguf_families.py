"""Families that llama.cpp computes: a row per family, what its file says of sizes, and what becomes of its tensors.

A row says how llama.cpp computes, too: what a configuration asks for beyond that is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..model.per_layer import TYPE


Widths = tuple[int, int, int]  # of a layer: query heads, heads of keys and values, channels of the MLP


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes the models of one `model_type`.

    Attributes:
        arch (`str`): its name there.
        per_layer (`str`, *optional*): the name there of models whose layers differ in heads and channels.
        expected (`Mapping[str, Any]`): settings that llama.cpp computes by, whatever a configuration says.
        turned (`bool`): whether the halves of a head that turn together lie beside each other there.
        lifted (`bool`): whether weights of norms are stored less 1, and whole there.
        windowed (`bool`): whether llama.cpp knows of the window that some layers see.
        transposed (`tuple[str, ...]`): endings of the matrices that are stored transposed, (in, out).
        ropes (`tuple[str, ...]`): ways of turning positions that are written.
        write (`Callable`, *optional*): writes what else the family's file says: writer, configuration.
        check (`Callable`, *optional*): a configuration -> what else of it is not computed, in words; "" for nothing.
    """

    arch: str
    per_layer: str | None = None
    expected: Mapping[str, Any] = field(default_factory=dict)
    turned: bool = False
    lifted: bool = False
    windowed: bool = False
    transposed: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ("default",)
    write: Callable[[Any, Any], None] | None = None
    check: Callable[[Any], str] | None = None


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def widths_of(own: Any) -> Widths:
    """Query heads, heads of keys and values, and channels of the MLP of one layer, by its configuration."""
    heads = own.num_attention_heads
    said = (getattr(own, name, None) for name in ("intermediate_size", "n_inner"))
    channels = next((value for value in said if value is not None), 4 * own.hidden_size)
    return heads, getattr(own, "num_key_value_heads", None) or heads, channels


def write_sizes(writer: Any, config: Any, family: Family, widths: list[Widths]) -> None:
    """Write what a file says of its model's sizes, to gguf's writer."""
    longest, ropes = config.max_position_embeddings, rope_settings(config)
    widths = [(queries, keys, max(channels, 1)) for queries, keys, channels in widths]  # see gguf_tensors._is_there
    queries, keys, channels = ([*column] if len(set(widths)) > 1 else column[0] for column in zip(*widths))
    writer.add_block_count(len(widths))
    window = None if family.windowed else getattr(config, "sliding_window", None)
    # Beyond a sliding window llama.cpp would see what the model does not.
    writer.add_context_length(min(longest, window or longest))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(queries)
    writer.add_head_count_kv(keys)
    writer.add_feed_forward_length(channels)
    writer.add_vocab_size(config.vocab_size)
    if ropes:
        head = _head(config)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(int(head * ropes.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(float(ropes["rope_theta"]))
    for name in ("rms_norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon"):
        if (epsilon := getattr(config, name, None)) is not None:
            (writer.add_layer_norm_rms_eps if name == "rms_norm_eps" else writer.add_layer_norm_eps)(epsilon)
    if family.write is not None:
        family.write(writer, config)


def rope_settings(config: Any) -> Mapping[str, Any]:
    """How a model turns positions, of full attention where its layers differ; nothing where it does not."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def _check_windows(every: int) -> Callable[[Any], str]:
    def check(config: Any) -> str:
        kinds = [
            "full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(len(config.layer_types))
        ]
        if list(config.layer_types) != kinds:
            return f"windows in other layers than all but every {every}th"
        # by its number of layers llama.cpp knows the largest, which scales by the width
        largest = config.num_hidden_layers == (46 if every == 2 else 62)
        scale = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        if config.query_pre_attn_scalar != scale:
            return f"query_pre_attn_scalar={config.query_pre_attn_scalar} beside a head_dim of {config.head_dim}"
        return ""

    return check


def _write_gemma2(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _check_gemma2(config: Any) -> str:
    # llama.cpp caps by numbers of its own where a file names none
    missing = [name for name in ("attn_logit_softcapping", "final_logit_softcapping") if not getattr(config, name)]
    return f"no {missing[0]}" if missing else _check_windows(2)(config)


def _write_gemma3(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(float(config.rope_parameters["sliding_attention"]["rope_theta"]))
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _check_gemma3(config: Any) -> str:
    kind = config.rope_parameters["sliding_attention"].get("rope_type", "default")
    return f"positions turned by {kind!r} in its windows" if kind != "default" else _check_windows(6)(config)


def _write_experts(writer: Any, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _check_experts(config: Any) -> str:
    return "layers without experts" if config.mlp_only_layers or config.decoder_sparse_step != 1 else ""


def _write_phi3(writer: Any, config: Any) -> None:
    ropes = rope_settings(config)
    if ropes.get("rope_type", "default") == "longrope":
        original = ropes["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        attention = ropes.get("attention_factor") or math.sqrt(1 + math.log(scale) / math.log(original))
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention if scale > 1 else 1.0)


def _write_granite(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _write_stablelm(writer: Any, config: Any) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


_SILU = {"hidden_act": "silu"}
_UNBIASED = {**_SILU, "attention_bias": False}
_LLAMA = {**_UNBIASED, "mlp_bias": False}
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_GEMMA |= {"use_bidirectional_attention": False}
_GPT2 = {"activation_function": "gelu_new", "scale_attn_weights": True, "add_cross_attention": False}
_GPT2 |= {"scale_attn_by_inverse_layer_idx": False}

FAMILIES = {  # `model_type` -> row
    "llama": Family("llama", "deci", _LLAMA, turned=True, ropes=("default", "llama3")),
    "mistral": Family("llama", "deci", _LLAMA, turned=True, ropes=("default", "llama3")),
    "qwen2": Family("qwen2", expected=_SILU),
    "qwen3": Family("qwen3", expected=_UNBIASED),
    "qwen3_moe": Family(
        "qwen3moe", expected={**_UNBIASED, "norm_topk_prob": True}, write=_write_experts, check=_check_experts
    ),
    "gemma": Family("gemma", expected=_GEMMA, lifted=True),
    "gemma2": Family("gemma2", expected=_GEMMA, lifted=True, windowed=True, write=_write_gemma2, check=_check_gemma2),
    "gemma3_text": Family(
        "gemma3", expected=_GEMMA, lifted=True, windowed=True, write=_write_gemma3, check=_check_gemma3
    ),
    "phi3": Family("phi3", expected=_SILU, ropes=("default", "longrope"), write=_write_phi3),
    "gpt2": Family("gpt2", expected=_GPT2, transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight")),
    "granite": Family("granite", expected=_LLAMA, turned=True, write=_write_granite),
    "olmo2": Family("olmo2", expected=_UNBIASED),
    "starcoder2": Family("starcoder2", expected={"hidden_act": "gelu_pytorch_tanh"}),
    "stablelm": Family("stablelm", expected={**_SILU, "qk_layernorm": False}, write=_write_stablelm),
}


def family_of(config: Any, where: Any) -> Family:
    """The row of a configuration.

    Raises:
        ValueError: there is none, or llama.cpp would compute otherwise than the model at `where`.
    """
    name = config.model_type.removeprefix(TYPE)
    if name not in FAMILIES:
        raise ValueError(
            f"{where} is a {config.model_type}; written as GGUF here are {', '.join(FAMILIES)}. Of other families, "
            "llama.cpp's own convert_hf_to_gguf.py takes plain models."
        )
    family = FAMILIES[name]
    said = "which is not written as GGUF here"
    kind = rope_settings(config).get("rope_type", "default")
    if kind not in family.ropes:
        raise ValueError(f"{where} turns positions by {kind!r}, {said}.")
    for setting, expected in family.expected.items():
        if (found := getattr(config, setting, None)) not in (None, expected):
            raise ValueError(f"{where} has {setting}={found!r}, {said}.")
    if family.check is not None and (other := family.check(config)):
        raise ValueError(f"{where} has {other}, {said}.")
    if config.model_type.startswith(TYPE) and family.per_layer is None and len(set(layer_widths(config))) > 1:
        raise ValueError(
            f"{where} has layers that differ, which llama.cpp computes of llama and mistral alone; prune with "
            "layout='padded' or 'uniform' instead."
        )
    return family


def layer_widths(config: Any) -> list[Widths]:
    """Heads and channels of every layer."""
    return [widths_of(own) for own in config.per_layer_config]


def made_tensors(config: Any) -> dict[str, Tensor]:
    """What a configuration stands for and a file of llama.cpp holds as tensors: name there -> (head_dim / 2,)."""
    ropes, head = rope_settings(config), _head(config)
    kind = ropes.get("rope_type", "default")
    if kind == "llama3":
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        turns = torch.arange(0, head, 2).float() / head
        return {"rope_freqs.weight": ropes["rope_theta"] ** -turns / found}
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(ropes[f"{name}_factor"]).float() for name in ("long", "short")
        }
    return {}
