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
