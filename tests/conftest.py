"""Tiny random models of many families, built from configs: `tiny(name)` is a copy of one, `inputs(name)` feeds it."""

from __future__ import annotations

from . import surroundings  # noqa: F401 - before all that reads the environment when it is imported


# isort: split
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from optimum_dsa import demo_texts
from optimum_dsa.common.fence_rows import DependencyError

from .tiny import LOADS_COMPRESSED


VOCABULARY = 97
SAMPLES, LENGTH = 6, 12

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
}
ENCODER = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.1,
}
PLAIN = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
HYBRID_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
IMAGE_TOKEN = 90


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, load it again, and feed it."""

    make: Callable[[], nn.Module]
    auto: str = "AutoModelForCausalLM"
    feed: str = "text"


def decoder(name: str, **changes) -> Family:
    """A causal language model of `<name>Config`; a size of `None` is one that the config does not know."""
    settings = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
    return Family(lambda: tf.AutoModelForCausalLM.from_config(getattr(tf, f"{name}Config")(**settings)))


def vision_language(name: str, vision: str, text: str, changes: dict, **settings) -> Family:
    """A vision tower, a projector and a language tower."""
    auto = "AutoModelForImageTextToText"

    def make() -> nn.Module:
        config = getattr(tf, f"{name}Config")(
            vision_config=getattr(tf, f"{vision}VisionConfig")(**VISION),
            text_config=getattr(tf, f"{text}Config")(**SIZES | changes),
            image_token_id=IMAGE_TOKEN,
            **settings,
        )
        return getattr(tf, auto).from_config(config)

    return Family(make, auto, "images and text")


FAMILIES: dict[str, Family] = {
    "llama": decoder("Llama"),
    "mistral": decoder("Mistral", sliding_window=4),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3"),
    "gemma": decoder("Gemma"),
    "gemma2": decoder("Gemma2", **ALTERNATING, query_pre_attn_scalar=8),
    "gemma3": decoder("Gemma3Text", **ALTERNATING, query_pre_attn_scalar=8),
    "gemma4": decoder(
        "Gemma4Text",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
        global_head_dim=16,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "phi": decoder("Phi", head_dim=None),
    "opt": decoder("OPT", **PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": decoder("GPT2", **PLAIN),
    "gpt_neox": decoder("GPTNeoX", num_key_value_heads=None, head_dim=None),
    "bloom": decoder("Bloom", **PLAIN),
    "falcon_new": decoder("Falcon", **PLAIN, num_kv_heads=2, new_decoder_architecture=True),
    "falcon_old": decoder("Falcon", **PLAIN, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "mixtral": decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": decoder("Qwen3Moe", num_experts=4, **ROUTED),
    "gpt_oss": decoder("GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "deepseek_v3": decoder(
        "DeepseekV3",
        **LATENT,
        **ROUTED,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "llama4": decoder(
        "Llama4Text",
        intermediate_size=16,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_layers=[1],
    ),
    "dbrx": decoder(
        "Dbrx",
        **dict.fromkeys(["hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]),
        **PLAIN,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "longcat": decoder(
        "LongcatFlash",
        **LATENT,
        num_hidden_layers=None,
        num_layers=2,
        num_key_value_heads=4,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        intermediate_size=None,
        moe_topk=2,
        n_routed_experts=4,
        zero_expert_num=2,
    ),
    "jamba": decoder(
        "Jamba",
        **HYBRID_EXPERTS,
        head_dim=None,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "zamba2": decoder(
        "Zamba2",
        head_dim=None,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_mem_blocks=1,
        adapter_rank=4,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=2,
        chunk_size=4,
    ),
    "qwen3_next": decoder(
        "Qwen3Next",
        **HYBRID_EXPERTS,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "jetmoe": decoder("JetMoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8, head_dim=None),
    "stablelm": decoder("StableLm", head_dim=None),
    "cohere": decoder("Cohere", head_dim=None),
    "llava": vision_language("Llava", "CLIP", "Llama", {}),
    "aya_vision": vision_language("AyaVision", "Siglip", "Cohere2", {"sliding_window": 4}, downsample_factor=1),
    "bert": Family(lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), "AutoModelForMaskedLM"),
    "distilbert": Family(
        lambda: tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
        ),
        "AutoModelForMaskedLM",
    ),
    "vit": Family(
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=5)),
        "AutoModelForImageClassification",
        "images",
    ),
    "t5": Family(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
            )
        ),
        "AutoModelForSeq2SeqLM",
    ),
    "bart": Family(
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
        "AutoModelForSeq2SeqLM",
    ),
    "whisper": Family(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=LENGTH, max_target_positions=64)
        ),
        "AutoModelForSpeechSeq2Seq",
        "sound",
    ),
}


@cache
def _built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[name].make().eval()


def _text(samples: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 80, (samples, length), generator=torch.Generator().manual_seed(0))


def _inputs(name: str, samples: int = SAMPLES) -> dict[str, Tensor]:
    kind, generator = FAMILIES[name].feed, torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    if kind == "images":
        return {"pixel_values": images}
    if kind == "sound":
        sound = torch.randn(samples, 8, 2 * LENGTH, generator=generator)
        return {"input_features": sound, "decoder_input_ids": _text(samples)}
    if kind == "images and text":
        patches = torch.full((samples, 4), IMAGE_TOKEN)
        return {"input_ids": torch.cat([patches, _text(samples)], dim=1), "pixel_values": images}
    return {"input_ids": _text(samples)}


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that loads a compressed checkpoint is skipped where transformers cannot, with what users are told."""
    try:
        return (yield)
    except DependencyError as error:
        if LOADS_COMPRESSED or "Compressed checkpoints load with" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def _small():
    """One thread, for threads that wait for each other cost more than tiny models do; no progress bars and notices."""
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], nn.Module]:
    """`tiny("llama")`: a copy of the family's tiny model, to change at will."""
    return lambda name: copy.deepcopy(_built(name))


@pytest.fixture(scope="session")
def inputs() -> Callable[..., dict[str, Tensor]]:
    """`inputs("llama", samples=6)`: what the family's model can be calibrated with."""
    return _inputs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of held-out text, short enough to be fast."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(demo_texts("calibration"))[:20_000])
    return str(path)


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """The folder to which transformers copies the code of checkpoints, to import it from there: one of the tests'."""
    place = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place))
        yield place
