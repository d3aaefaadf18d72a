"""The GGUF of a tiny Llama with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np


HIDDEN, HEADS, GROUPS, BLOCKS = 32, 4, 2, 2
TOKENS = [*map(chr, range(33, 127)), "Ġ", "ab", "<s>", "</s>"]


def write_gguf(
    path: Path, ffn: int = 48, kind: str | None = None, lacks: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Write it, its matrices quantised as `kind`, such as "Q8_0"; the tensors as they were before, by name.

    Those that it `lacks` would be in another part of a GGUF in several files.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    sizes = {
        "context_length": 64,
        "embedding_length": HIDDEN,
        "block_count": BLOCKS,
        "feed_forward_length": ffn,
        "head_count": HEADS,
        "head_count_kv": GROUPS,
        "vocab_size": len(TOKENS),
        "rope_dimension_count": HIDDEN // HEADS,
        "rope_freq_base": 1e4,
        "layer_norm_rms_eps": 1e-5,
        "tokenizer_model": "gpt2",
        "token_list": TOKENS,
        "token_types": [1] * (len(TOKENS) - 2) + [3, 3],
        "token_merges": ["a b"],
        "bos_token_id": len(TOKENS) - 2,
        "eos_token_id": len(TOKENS) - 1,
    }
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_gate": (ffn, HIDDEN), "ffn_up": (ffn, HIDDEN)}
    block |= {"ffn_down": (HIDDEN, ffn), "attn_q": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    block |= dict.fromkeys(["attn_k", "attn_v"], (HIDDEN // HEADS * GROUPS, HIDDEN))
    shapes |= {f"blk.{number}.{name}": shape for number in range(BLOCKS) for name, shape in block.items()}
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if name not in lacks
    }
    quantised = kind and gguf.GGMLQuantizationType[kind]
    if kind:
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for name, tensor in tensors.items():
        if kind and tensor.ndim == 2:
            writer.add_tensor(f"{name}.weight", gguf.quantize(tensor, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
