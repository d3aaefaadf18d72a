"""Small real parts that several tests share."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers.base import HfQuantizer


VOCABULARY = 97

LOADS_COMPRESSED = hasattr(HfQuantizer, "get_new_dtype")
# what older releases say instead is tested in test_fences.py
needs_compressed_loading = pytest.mark.skipif(
    not LOADS_COMPRESSED, reason="compressed checkpoints load with transformers 5.21 or newer"
)


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama of 3 blocks, hidden 32, in float32."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def tokens(samples: int = 6, length: int = 16, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Random token ids, (samples, length)."""
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def state(model) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, before: dict[str, torch.Tensor]) -> bool:
    """Whether every parameter and buffer is bit for bit what it was."""
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
