"""Shards of whole numbers: every tensor where it can be read in place, dense again as they were, damage named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_dsa import quantize
from optimum_dsa.checkpoint.integers_format import FORMATS
from optimum_dsa.checkpoint.integers_shards import is_integers, restore

from ..tiny import tiny_llama


# of 35 rows of 33 columns, an odd number of int8 lies before what is wider
@pytest.fixture(params=FORMATS)
def folder(request, tmp_path):
    """A quantised Llama in several shards."""
    model = tiny_llama(hidden_size=33, intermediate_size=35, num_attention_heads=3, num_key_value_heads=1, head_dim=8)
    model.bfloat16().save_pretrained(tmp_path / "in", max_shard_size="12KB")
    quantize(tmp_path / "in", tmp_path / "out", 8, 0, format=request.param)
    return tmp_path / "out"


def tensors_in(folder):
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def starts(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "I8": 1}
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
    stated = json.loads((folder / "config.json").read_text())
    assert is_integers(stated) and not is_integers({})
    restore(folder, tmp_path / "dense")
    dense, held = tensors_in(tmp_path / "dense"), tensors_in(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    if FORMATS[stated["quantization_config"]["format"]].packed:
        # of 8 bits, they are the bytes, of which the last of a row fill up a word
        numbers = held[f"{name}_packed"].view(torch.uint8)[:, :33].to(torch.int16) - 128
    else:
        numbers = held[name]
        assert numbers.dtype == torch.int8
    assert torch.equal(dense[name], (numbers * held[f"{name}_scale"].float()).bfloat16())
    assert torch.equal(dense["lm_head.weight"], held["lm_head.weight"])
    assert dense.keys() == tensors_in(tmp_path / "in").keys()


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
