"""Tensors that a model's class does not know go along, unpruned and named."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.checkpoint import unknown_tensors as module
from optimum_dsa.checkpoint.description import read_description
from optimum_dsa.checkpoint.shards import find_shards
from optimum_dsa.checkpoint.unknown_tensors import sizes_by_part, unknown_tensors

from ..conftest import FAMILIES
from ..tiny import same_state, state, tiny_llama
from ..tiny_gguf import write_gguf
from .test_forms import fp8, mxfp4, needs_gguf


HEAD = {
    "model.layers.92.eh_proj.weight": torch.randn(8, 16).bfloat16(),
    "model.layers.92.mlp.experts.0.down_proj.weight": torch.randn(4, 4),
    "model.layers.92.positions": torch.arange(5),
    "mtp.layers.0.weight": torch.zeros(6, 6),  # nothing but zeros, which an encoding would leave out
    "cls.seq_relationship.bias": torch.ones(2, dtype=torch.bool),
}


def with_head(folder, tensors=HEAD, **save):
    """A tiny Llama whose checkpoint holds more than its class knows."""
    tiny_llama().save_pretrained(folder, **save)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    save_file({**load_file(shard), **tensors}, shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(tensors, shard.name)
        index.write_text(json.dumps(content))
    return folder


def stored(folder):
    """Every tensor in a folder's weights, by name, as it is stored."""
    found = {}
    for name in find_shards(folder).files:
        with safe_open(folder / name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.contract
@pytest.mark.parametrize("size", [None, "20KB"])
@pytest.mark.parametrize("compressed", [False, True])
def test_they_go_along_and_are_named(tmp_path, caplog, size, compressed):
    base = with_head(tmp_path / "base", **({"max_shard_size": size} if size else {}))
    pruner = DSAPruner.from_pretrained(base)
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    assert "5 tensors that LlamaForCausalLM does not know" in caplog.text
    assert "model.layers.92, mtp.layers.0" in caplog.text.replace("cls.seq_relationship, ", "")
    out = tmp_path / "out"
    pruner.save_pretrained(out, compressed=compressed, **({"max_shard_size": size} if size else {}))
    written = stored(out)
    for name, tensor in HEAD.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
    index = json.loads(next(out.glob("*.index.json")).read_text())
    assert index["weight_map"].keys() == written.keys()
    said = read_description(out)["base_files"]["not_pruned"]
    assert said == {"model.layers.92": 149, "mtp.layers.0": 36, "cls.seq_relationship": 2}
    again = DSAPruner.from_pretrained(out)
    assert again.verify().holds and same_state(again.model, state(pruner.model))


def test_they_go_on_to_the_next_output(tmp_path):
    folder = with_head(tmp_path / "base")
    for number in range(2):
        pruner = DSAPruner.from_pretrained(folder)
        pruner.prune(None, DSAConfig(0.5 + number / 10, "magnitude", "uniform"))
        folder = tmp_path / f"out{number}"
        pruner.save_pretrained(folder, compressed=number == 0)
    assert HEAD.keys() <= stored(folder).keys()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert same_state(plain, state(pruner.model))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_model_has_any_of_its_own(family, tiny, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert unknown_tensors(loaded, [tmp_path / name for name in find_shards(tmp_path).files]) == {}


def test_tables_that_a_class_computes_are_none(tmp_path, tiny):
    model = tiny("gpt2")
    model.transformer.save_pretrained(tmp_path)  # names without a prefix, as GPT-2's own checkpoint has
    tables = {
        "h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "h.0.rotary_emb.inv_freq": torch.ones(4),
    }
    extra = {"wte_of_nobody.weight": torch.ones(2, 3)}
    save_file({**load_file(tmp_path / "model.safetensors"), **tables, **extra}, tmp_path / "model.safetensors")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert unknown_tensors(loaded, [tmp_path / "model.safetensors"]).keys() == extra.keys()


def test_another_class_than_the_checkpoints_own_was_chosen(tmp_path):
    base = with_head(tmp_path / "base")
    model = transformers.LlamaForSequenceClassification.from_pretrained(base)
    pruner = DSAPruner(model)
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    assert stored(tmp_path / "out").keys() & HEAD.keys() == set()


def test_they_are_in_files_of_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 150)
    base, out = with_head(tmp_path / "base"), tmp_path / "out"
    pruner = DSAPruner.from_pretrained(base)
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(out)
    assert HEAD.keys() <= stored(out).keys()
    assert len(find_shards(out).files) >= 4


def test_sizes_are_by_the_first_block(tmp_path):
    tensors = {"a.3.b.1.c": torch.ones(2, 3), "a.3.d": torch.ones(4), "lonely": torch.ones(5)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert sizes_by_part(dict.fromkeys(tensors, tmp_path / "x.safetensors")) == {"a.3": 10, "lonely": 5}


def pruned_to(out, base):
    pruner = DSAPruner.from_pretrained(base)
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(out)
    return read_description(out).get("base_files") or {}


@pytest.mark.parametrize("sharded", [False, True])
def test_those_of_pickles_are_read_safely_and_go_along(tmp_path, sharded, caplog):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if sharded:
        torch.save(tensors, base / "pytorch_model-00001-of-00002.bin")
        torch.save(HEAD, base / "pytorch_model-00002-of-00002.bin")
        files = dict.fromkeys(tensors, "pytorch_model-00001-of-00002.bin")
        index = {"metadata": {}, "weight_map": files | dict.fromkeys(HEAD, "pytorch_model-00002-of-00002.bin")}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save({**tensors, **HEAD}, base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    said = pruned_to(tmp_path / "out", base)
    assert said["not_pruned"] == {"model.layers.92": 149, "mtp.layers.0": 36, "cls.seq_relationship": 2}
    assert "5 tensors that LlamaForCausalLM does not know" in caplog.text
    written = stored(tmp_path / "out")
    assert all(
        written[name].dtype == tensor.dtype and torch.equal(written[name], tensor) for name, tensor in HEAD.items()
    )


def test_a_pickle_that_runs_code_is_not_read(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path / "ran").write_text, ("x",)

    torch.save({"a": torch.ones(2), "b": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no tensors that can be read safely"):
        unknown_tensors(tiny_llama(), [tmp_path / "pytorch_model.bin"])
    assert not (tmp_path / "ran").exists()


def test_of_a_quantised_base_plain_parts_go_along_and_packed_ones_are_named(tmp_path, caplog):
    base = fp8(tmp_path / "base")
    head = {
        "model.layers.92.eh_proj.weight": torch.ones(16, 16).to(torch.float8_e4m3fn),
        "model.layers.92.eh_proj.weight_scale_inv": torch.ones(1, 1),
        "model.layers.92.norm.weight": torch.ones(16),
        "mtp.norm.weight": torch.ones(8).bfloat16(),
    }
    shard = base / "model.safetensors"
    save_file({**load_file(shard), **head}, shard, {"format": "pt"})
    said = pruned_to(tmp_path / "out", base)
    assert said["not_pruned"] == {"mtp.norm": 8} and said["not_kept"] == {"model.layers.92": 273}
    written = stored(tmp_path / "out")
    assert "mtp.norm.weight" in written and not any("92" in name or "scale" in name for name in written)
    assert (
        "273 weights that LlamaForCausalLM does not know" in caplog.text and "(model.layers.92): they" in caplog.text
    )


@pytest.mark.parametrize("made", [fp8, mxfp4])
def test_what_a_quantiser_made_of_known_weights_is_none(tmp_path, made):
    said = pruned_to(tmp_path / "out", made(tmp_path / "base"))
    assert "not_pruned" not in said and "not_kept" not in said


@needs_gguf
@pytest.mark.parametrize("kind", [None, "Q8_0"])
def test_what_a_gguf_holds_beyond_the_model_is_named(tmp_path, monkeypatch, caplog, kind):
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "plain.gguf", 64, kind)
    assert "not_kept" not in pruned_to(tmp_path / "out", tmp_path / "plain.gguf")
    close = gguf.GGUFWriter.write_header_to_file

    def with_more(writer):
        writer.add_tensor("blk.2.nextn.eh_proj.weight", torch.ones(32, 64).numpy())
        writer.add_tensor("blk.2.attn_norm.weight", torch.ones(32).numpy())
        close(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_more)
    write_gguf(tmp_path / "more.gguf", 64, kind)
    assert pruned_to(tmp_path / "more", tmp_path / "more.gguf")["not_kept"] == {"blk.2": 2080}
    assert "2,080 weights that LlamaForCausalLM does not know" in caplog.text and "(blk.2): they cannot" in caplog.text
