"""Shards of whole numbers: every tensor where it can be read in place, dense again as they were, damage named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_dsa import quantize
from optimum_dsa.checkpoint.integers_shards import is_integers, restore

from ..tiny import tiny_llama


@pytest.fixture
def folder(tmp_path):
    """A quantised Llama in several shards."""
    tiny_llama(hidden_size=64).bfloat16().save_pretrained(tmp_path / "in", max_shard_size="60KB")
    quantize(tmp_path / "in", tmp_path / "out", 8, 0)
    return tmp_path / "out"


def starts(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2}
    return [
        (8 + length + one["data_offsets"][0], sizes[one["dtype"]])
        for name, one in header.items()
        if name != "__metadata__"
    ]


def test_every_tensor_begins_at_a_multiple_of_its_width(folder):
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and all(start % size == 0 for file in files for start, size in starts(file))
    named = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert named == {name: file.name for file in files for name in load_file(file)}


def test_numbers_times_scales_are_what_is_dense(folder, tmp_path):
    assert is_integers(json.loads((folder / "config.json").read_text())) and not is_integers({})
    restore(folder, tmp_path / "dense")
    dense = {name: one for file in (tmp_path / "dense").glob("*.safetensors") for name, one in load_file(file).items()}
    held = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    packed = held["model.layers.0.mlp.up_proj.weight_packed"]
    numbers = packed.view(torch.uint8).to(torch.int16) - 128  # of 8 bits, they are the bytes
    expected = numbers * held["model.layers.0.mlp.up_proj.weight_scale"].float()
    assert torch.equal(dense["model.layers.0.mlp.up_proj.weight"], expected.bfloat16())
    assert torch.equal(dense["lm_head.weight"], held["lm_head.weight"])


def test_others_numbers_and_lost_parts_are_refused(folder, tmp_path):
    config = folder / "config.json"
    stated = json.loads(config.read_text())
    weights = stated["quantization_config"]["config_groups"]["group_0"]["weights"]
    for change in ({"symmetric": False}, {"num_bits": 3}):
        weights |= change
        config.write_text(json.dumps(stated))
        with pytest.raises(ValueError, match="numbers that `optimum-cli dsa quantize` does not write"):
            restore(folder, tmp_path / "dense")
    weights |= {"symmetric": True, "num_bits": 8}
    config.write_text(json.dumps(stated))
    file = next(file for file in folder.glob("*.safetensors") if any("_scale" in name for name in load_file(file)))
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("_scale"))
    save_file({name: one for name, one in tensors.items() if name != lost}, file)
    with pytest.raises(ValueError, match=f"{lost} is in no shard of"):
        restore(folder, tmp_path / "dense")
