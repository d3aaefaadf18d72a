"""Tiny models of many families, with what can be cut out of a block of each."""

import torch
import transformers

from optimum_dsa.model.inputs import text_part


# What configurations call the number of blocks.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def _causal(kind, **changes):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return lambda **others: _made(kind, "ForCausalLM", **{**sizes, **changes, **others})


def _made(kind, head, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    # Biases and norms begin as zeros and ones, with which a mistake among them would not be seen.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


MAMBA = {
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "pad_token_id": 0,
}
DELTA = {
    "head_dim": 8,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "mlp_only_layers": list(range(8)),
}


def _tower(kind, **settings):
    """A model that reads pictures as well, whose language tower is a Llama or like one."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **GROUPED}
    return lambda **others: _made(
        kind,
        "ForConditionalGeneration",
        text_config={**sizes, **settings["text"], **others},
        vision_config=settings["vision"],
        **settings["rest"],
    )


def _other(kind, head, **settings):
    return lambda **others: _made(kind, head, **{**settings, **others})


SEQ2SEQ = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQ2SEQ |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1, "eos_token_id": 2}
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP |= {"image_size": 16, "patch_size": 8}
PATCHES = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 4}
PATCHES |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
SECTIONS = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
NEW = {"new_decoder_architecture": True}
GROUPS, HEADS = {"kv_group": 2, "ffn": 48}, {"head": 4, "ffn": 48}

# Family -> what makes a model of it, and by kind how many structures a block has.
FAMILIES = {
    "Llama": (_causal("Llama", **GROUPED), GROUPS),
    "Llama with biases": (_causal("Llama", attention_bias=True, mlp_bias=True, **GROUPED), GROUPS),
    "Llama without groups": (_causal("Llama", intermediate_size=48), HEADS),
    "Llama with one head of keys": (_causal("Llama", num_key_value_heads=1, intermediate_size=48), HEADS),
    "Mistral": (_causal("Mistral", **GROUPED), GROUPS),
    "Qwen2": (_causal("Qwen2", **GROUPED), GROUPS),
    "Qwen3": (_causal("Qwen3", head_dim=8, **GROUPED), GROUPS),
    "Gemma2": (_causal("Gemma2", head_dim=8, **GROUPED), GROUPS),
    "Phi": (_causal("Phi", intermediate_size=48), HEADS),
    "Phi3": (_causal("Phi3", pad_token_id=0, **GROUPED), GROUPS),
    "OPT": (_causal("OPT", ffn_dim=48, word_embed_proj_dim=32), HEADS),
    "GPT2": (_other("GPT2", "LMHeadModel", vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_inner=48), HEADS),
    "GPTNeoX": (_causal("GPTNeoX", intermediate_size=48), HEADS),
    "Falcon": (_causal("Falcon", multi_query=True, new_decoder_architecture=False), {"head": 4, "ffn": 128}),
    "Mixtral": (_causal("Mixtral", num_local_experts=4, **GROUPED), {"kv_group": 2, "expert": 4}),
    "Qwen3Moe": (
        _causal("Qwen3Moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8, **GROUPED),
        {"kv_group": 2, "expert": 6},
    ),
    "GptOss": (
        _causal("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, **GROUPED),
        {"kv_group": 2, "expert": 4},
    ),
    "Bert": (_other("Bert", "ForMaskedLM", vocab_size=97, **WIDE), HEADS),
    "ViT": (_other("ViT", "ForImageClassification", image_size=16, patch_size=4, **WIDE), HEADS),
    # Slopes that come from outside the block are of all its heads. T5's bias of positions is cut with them.
    "Bloom": (
        _other("Bloom", "ForCausalLM", vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        {"head": 4, "ffn": 128},
    ),
    "T5": (_other("T5", "ForConditionalGeneration", vocab_size=97, **T5), HEADS),
}


# Of these, too: how a layout without a plain class has them is tried with those above.
EVERY = {
    **FAMILIES,
    "Lfm2": (
        # Its first block mixes by a convolution, which stays.
        _causal("Lfm2", full_attn_idxs=[1, 3], num_key_value_heads=2, intermediate_size=96, block_multiple_of=16),
        {"kv_group": 2, "ffn": 64},
    ),
    # Every other block mixes by a recurrence, which stays: Mamba's, and that of a gated delta rule.
    "Jamba": (_causal("Jamba", num_key_value_heads=2, intermediate_size=48, **MAMBA), GROUPS),
    "Qwen3Next": (_causal("Qwen3Next", num_key_value_heads=2, intermediate_size=48, **DELTA), GROUPS),
    # Slopes alone, and slopes in the mask.
    "Mpt": (
        _other("Mpt", "ForCausalLM", vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
        {"head": 4, "ffn": 128},
    ),
    "Falcon with slopes": (_causal("Falcon", alibi=True, num_kv_heads=2, **NEW), {"kv_group": 2, "ffn": 128}),
    "Bart": (_other("Bart", "ForConditionalGeneration", vocab_size=97, **SEQ2SEQ), HEADS),
    "Llava": (
        _tower("Llava", text={"model_type": "llama"}, vision=CLIP, rest={"image_token_index": 96}),
        GROUPS,
    ),
    "Qwen2_5_VL": (_tower("Qwen2_5_VL", text={"rope_parameters": SECTIONS}, vision=PATCHES, rest={}), GROUPS),
}


def deeper(family, depth):
    """A model of a family with `depth` blocks in each stack."""
    config = text_part(EVERY[family][0]().config)
    return EVERY[family][0](**{name: depth for name in DEPTHS if name in vars(config)})


def batch_of(family, samples=1, length=12):
    """Inputs by name, (samples, length), or pictures."""
    if family == "ViT":
        return {"pixel_values": torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    ids = torch.randint(97, (samples, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if family in ("T5", "Bart") else {"input_ids": ids}
