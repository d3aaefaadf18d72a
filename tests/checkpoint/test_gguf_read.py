"""A GGUF of a pruned model, read again: its zeros are counted, and what is none of ours is refused."""

import json

import pytest
import torch

from optimum_dsa import DSAConfig, DSAPruner, DSAStructuredConfig
from optimum_dsa.checkpoint.exports import export
from optimum_dsa.checkpoint.gguf_read import read_gguf

from ..test_commands import run
from ..tiny_gguf import write_gguf
from .engine import family, save, sentencepiece


gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A pruned mixture of experts and the folder that it was saved to, with a tokenizer."""
    pruner = DSAPruner(family("qwen3_moe").bfloat16(), sentencepiece())
    pruner.prune(None, DSAConfig(0.5, method="magnitude", allocation="uniform", pattern="row"))
    folder = tmp_path_factory.mktemp("pruned") / "out"
    pruner.save_pretrained(folder, compressed=True)
    return pruner, folder


@pytest.mark.parametrize("kind", ["f16", "q4_0"])
def test_verify_counts_the_zeros_of_a_file(pruned, kind, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.gguf"
    export(pruned[1], path, "gguf", kind)
    code, output, _ = run(monkeypatch, capsys, "verify", str(path))
    # What magnitude keeps of a half is too large to be rounded to zero.
    assert code == 0 and output.startswith(f"holds: {pruned[0].report.removed:,} of "), output
    assert "rounded to zero" not in output


@pytest.mark.parametrize("structures", [("attention",), ("mlp",), ("attention", "mlp")])
def test_what_is_absent_from_a_layer_is_counted(structures, tmp_path, monkeypatch, capsys):
    pruner = DSAPruner(family("llama", num_hidden_layers=4), sentencepiece())
    tokens = torch.arange(64).view(4, 16)
    pruner.prune(tokens, DSAStructuredConfig(0.4, structures, layout="per_layer"))
    pruner.prune(None, DSAConfig(0.5, method="magnitude", allocation="uniform", pattern="row"))
    pruner.save_pretrained(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "out.gguf", "gguf", "f16")
    code, output, _ = run(monkeypatch, capsys, "verify", str(tmp_path / "out.gguf"))
    assert code == 0 and output.startswith("holds: ") and "none in " in output, output


def test_what_is_rounded_to_zero_is_counted_apart(tmp_path, monkeypatch, capsys):
    pruner = DSAPruner(family("llama"), sentencepiece())
    pruner.prune(None, DSAConfig(0.02, method="magnitude", allocation="uniform", pattern="row"))
    pruner.save_pretrained(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "out.gguf", "gguf", "q4_0")
    code, output, _ = run(monkeypatch, capsys, "verify", str(tmp_path / "out.gguf"), "--json")
    found = json.loads(output)
    assert code == 0 and found["rounded"] == found["removed"] - pruner.report.removed > 0
    code, output, _ = run(monkeypatch, capsys, "verify", str(tmp_path / "out.gguf"))
    assert f"{found['rounded']:,} of them were kept, and are rounded to zero in this file" in output


def test_a_zero_less_is_found(pruned, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.gguf"
    export(pruned[1], path, "gguf", "f16")
    tensor = next(one for one in gguf.GGUFReader(path, "r+").tensors if one.name == "blk.1.ffn_down_exps.weight")
    tensor.data[:, :, :4] = 1.0
    code, output, _ = run(monkeypatch, capsys, "verify", str(path))
    assert code == 1 and "wrong: model.layers.1 has" in output and "fewer than" in output


def test_what_says_nothing_of_pruning_or_is_damaged_is_refused(tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "other.gguf", 64)
    code, _, errors = run(monkeypatch, capsys, "verify", str(tmp_path / "other.gguf"))
    assert code == 2 and "says nothing of pruning" in errors
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ValueError, match="broken.gguf cannot be read"):
        read_gguf(tmp_path / "broken.gguf", tmp_path / "out")


def test_a_model_that_was_not_pruned_says_nothing(tmp_path):
    folder = save(family("llama"), tmp_path / "model", sentencepiece())
    export(folder, tmp_path / "out.gguf", "gguf")
    assert not any("optimum_dsa" in name for name in gguf.GGUFReader(tmp_path / "out.gguf").fields)
