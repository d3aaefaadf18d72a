"""Finished blocks of a model whose weights are on the disk: there once, and shards of its checkpoint in the end."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.checkpoint import finished_shards
from optimum_dsa.checkpoint.finished_shards import ready_shards
from optimum_dsa.common import fences
from optimum_dsa.model.offload import lies_in, resident

from ..conftest import FAMILIES
from ..tiny import same_state, state, tiny_llama, tokens


CONFIG = DSAConfig(0.5, "sparsegpt", "uniform")


@pytest.fixture
def source(tmp_path) -> str:
    tiny_llama().save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def from_disk(source: str, folder: Path) -> DSAPruner:
    return DSAPruner.from_pretrained(source, device_map={"": "disk"}, offload_folder=str(folder / "scratch"))


def pruned_in_memory(source: str):
    pruner = DSAPruner.from_pretrained(source)
    pruner.prune(tokens(), CONFIG)
    return pruner.model


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.contract
@pytest.mark.parametrize("compressed", [False, True])
def test_blocks_are_on_the_disk_once_and_are_the_shards_of_an_ordinary_checkpoint(compressed, source, tmp_path):
    pruner, blocks, out = from_disk(source, tmp_path), tmp_path / "blocks", tmp_path / "out"
    pruner.prune(tokens(), CONFIG, checkpoints=blocks)
    assert not written(tmp_path / "scratch")  # nothing beside the finished blocks
    assert lies_in(pruner.model, "model.layers.1.mlp.up_proj.weight")[0] == blocks / "block-0001.safetensors"
    pruner.save_pretrained(out, compressed=compressed)
    stem = "dsa_model" if compressed else "model"
    assert {name for name in written(out) if name.endswith("tensors")} == {
        f"{stem}-{number:05d}-of-00004.safetensors" for number in range(1, 5)
    }
    for number in () if compressed else range(3):
        shard = out / f"model-{number + 2:05d}-of-00004.safetensors"
        assert os.path.samefile(shard, blocks / f"block-{number:04d}.safetensors")
    expected = pruned_in_memory(source)
    assert same_state(transformers.AutoModelForCausalLM.from_pretrained(out), state(expected))
    if not compressed:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        found = [load_file(out / file) for file in sorted(set(index["weight_map"].values()))]
        assert index["metadata"]["total_size"] == sum(value.nbytes for shard in found for value in shard.values())
        assert index["weight_map"].keys() == state(expected).keys()


def test_a_prune_that_goes_on_reads_them_where_they_are(source, tmp_path):
    from_disk(source, tmp_path).prune(tokens(), CONFIG, checkpoints=tmp_path / "blocks")
    (tmp_path / "blocks" / "block-0002.safetensors").unlink()
    again = from_disk(source, tmp_path)
    again.prune(tokens(), CONFIG, checkpoints=tmp_path / "blocks", resume=True)
    assert not written(tmp_path / "scratch") and len(ready_shards(again.model)) == 3
    again.save_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(model, state(pruned_in_memory(source)))


# tied, with transposed weights; experts that a checkpoint has apart; two stacks, tied
@pytest.mark.parametrize("family,ready", [("gpt2", 3), ("mixtral", 0), ("t5", 4)])
def test_what_a_checkpoint_calls_otherwise_is_written_anew(family, ready, tiny, inputs, tmp_path):
    tiny(family).save_pretrained(tmp_path / "dense")
    load = getattr(transformers, FAMILIES[family].auto).from_pretrained
    pruner = DSAPruner(load(tmp_path / "dense", device_map={"": "disk"}, offload_folder=tmp_path / "scratch").eval())
    pruner.prune(inputs(family), CONFIG, checkpoints=tmp_path / "blocks")
    assert (len(ready_shards(pruner.model)) > 0) == (ready > 0)
    pruner.save_pretrained(tmp_path / "out")
    expected = DSAPruner(load(tmp_path / "dense").eval())
    expected.prune(inputs(family), CONFIG)
    assert same_state(load(tmp_path / "out"), state(expected.model))


def test_a_size_that_is_asked_for_is_kept_and_without_links_files_are_copied(source, tmp_path, monkeypatch):
    pruner = from_disk(source, tmp_path)
    pruner.prune(tokens(), CONFIG, checkpoints=tmp_path / "blocks")
    pruner.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    assert len([name for name in written(tmp_path / "small") if name.endswith("tensors")]) > 4
    monkeypatch.setattr(finished_shards.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    pruner.save_pretrained(tmp_path / "out")
    shard = tmp_path / "out" / "model-00002-of-00004.safetensors"
    assert shard.read_bytes() == (tmp_path / "blocks" / "block-0000.safetensors").read_bytes()
    assert shard.stat().st_nlink == 1


def test_what_was_changed_after_the_prune_is_saved_as_it_is(source, tmp_path):
    pruner = from_disk(source, tmp_path)
    pruner.prune(tokens(), CONFIG, checkpoints=tmp_path / "blocks")
    name = "model.layers.1.mlp.up_proj.weight"
    with resident(pruner.model, ["model.layers.1.mlp"]) as changes:
        with torch.no_grad():
            pruner.model.get_parameter(name).mul_(2)
        changes.add(name)
    assert len(ready_shards(pruner.model)) == 2
    pruner.save_pretrained(tmp_path / "out")
    found = state(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(found[name], 2 * state(pruned_in_memory(source))[name])


def test_releases_that_do_not_tell_names_save_them_anew(source, tmp_path, monkeypatch):
    pruner = from_disk(source, tmp_path)
    pruner.prune(tokens(), CONFIG, checkpoints=tmp_path / "blocks")
    monkeypatch.delattr("transformers.core_model_loading.revert_weight_conversion")
    assert not fences.keeps_names_when_saved(pruner.model, {}) and not ready_shards(pruner.model)
