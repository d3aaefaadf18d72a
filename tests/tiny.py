"""Small real parts that several tests share."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
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


def bos_tokenizer(adds: bool = True) -> PreTrainedTokenizerFast:
    """A token per word, 0 to 89 being known; id 0 begins a text, added as by Gemma's tokenizer where `adds`."""
    vocabulary = {name: number for number, name in enumerate(["<bos>", "<eos>", "<unk>", *map(str, range(90))])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    if adds:
        made.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def masking_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word, 5 to 94 being the numbers from 0; a text stands between [CLS] (1) and [SEP] (2), as BERT's."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    vocabulary = {name: number for number, name in enumerate([*special, *map(str, range(90))])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = ("pad_token", "cls_token", "sep_token", "mask_token", "unk_token")
    return PreTrainedTokenizerFast(tokenizer_object=made, **dict(zip(names, special)))


def state(model) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, before: dict[str, torch.Tensor]) -> bool:
    """Whether every parameter and buffer is bit for bit what it was."""
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
