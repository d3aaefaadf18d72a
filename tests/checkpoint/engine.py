"""The real llama.cpp, asked for what it makes of a GGUF, and tiny models of the families that it computes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from optimum_dsa import demo_model, demo_texts


VOCABULARY = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWS = {"sliding_window": 8, "query_pre_attn_scalar": 32}
NO_HEAD = {"head_dim": None}  # these divide their width by their heads
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", NO_HEAD),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {**WINDOWS, "num_hidden_layers": 3}),
    "gemma3_text": ("Gemma3Text", {**WINDOWS, "num_hidden_layers": 7}),
    "phi3": ("Phi3", NO_HEAD),
    "gpt2": ("GPT2", {**NO_HEAD, "num_key_value_heads": None, "intermediate_size": None}),
    "granite": (
        "Granite",
        {**NO_HEAD, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
        | {"residual_multiplier": 0.7},
    ),
    "olmo2": ("Olmo2", NO_HEAD),
    "starcoder2": ("Starcoder2", NO_HEAD),
    "stablelm": ("StableLm", {**NO_HEAD, "use_qkv_bias": True}),
}


def family(name: str, **changes) -> torch.nn.Module:
    """A tiny random model of a family, no norm or bias of which is without effect."""
    kind, own = FAMILIES[name]
    settings = {key: value for key, value in {**SIZES, **own, **changes}.items() if value is not None}
    torch.manual_seed(0)
    # llama.cpp caps scores where SDPA does not
    config = getattr(tf, f"{kind}Config")(**settings)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


def sentencepiece(prefix: bool = True, size: int = VOCABULARY) -> tf.PreTrainedTokenizerFast:
    """A tokenizer as those of Llama 2 are: characters that are merged by score, and bytes for what is unknown."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    first = Tokenizer(BPE(unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581")] * prefix + [normalizers.Replace(" ", "\u2581")]
    first.normalizer = normalizers.Sequence(steps)
    text = "\n".join(demo_texts("calibration"))[:20_000].split("\n")
    first.train_from_iterator(text, BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    vocabulary = first.get_vocab()
    # All pairs that are a token together, by the order of the tokens, as scores would have it.
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(vocabulary, key=vocabulary.get)[len(special) :]
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    made = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = first.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefix
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def save(model, folder, tokenizer=None):
    """Write a model and a tokenizer, by default the demo's, cut to its vocabulary."""
    model.save_pretrained(folder)
    (tokenizer or tf.AutoTokenizer.from_pretrained(demo_model())).save_pretrained(folder)
    return folder


def served(path):
    """A GGUF, loaded by llama.cpp."""
    engine = pytest.importorskip("xllamacpp")
    settings = engine.CommonParams()
    settings.model.path, settings.n_ctx, settings.port, settings.warmup = str(path), 128, 0, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    return engine.Server(settings)


def next_token(server, prompt, best: int = 5) -> tuple[int, dict[int, float]] | None:
    """The token that llama.cpp writes after a prompt, text or token ids, and the best ones' log-probabilities.

    `None` where it is a byte that is no character yet: of such tokens its answers say nothing.
    """
    answer = server.handle_completions({"prompt": prompt, "temperature": 0, "max_tokens": 1, "n_probs": best})
    (choice,) = (answer if isinstance(answer, dict) else json.loads(answer))["choices"]
    if not (choice["logprobs"] or {}).get("content"):
        return None
    (step,) = choice["logprobs"]["content"]
    return step["id"], {row["id"]: row["logprob"] for row in step["top_logprobs"]}


def deviation(server, model, given: list[int], steps: int = 3) -> tuple[float, float]:
    """What the log-probabilities of llama.cpp and `model` differ by at most, greedy, after token ids.

    And by how much the token that llama.cpp chooses is less likely than the model's own: 0 where it is the same.
    """
    given, found = list(given), []
    while len(found) < steps:
        with torch.no_grad():
            expected = model(torch.tensor([given])).logits[0, -1].float().log_softmax(-1)
        said = next_token(server, given)
        if said is None:
            given.append(VOCABULARY // 2 + len(given))  # a token of characters, for a byte may follow itself for ever
            continue
        token, best = said
        differ = max(abs(value - expected[number].item()) for number, value in best.items())
        found.append((differ, (expected.max() - expected[token]).item()))
        given.append(int(expected.argmax()))
    return tuple(map(max, zip(*found)))
