"""Weight files of a folder: found, checked, read and written by tensor."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from optimum_dsa.checkpoint.encodings import BITMASK, DENSE
from optimum_dsa.checkpoint.shards import (
    Shards,
    check_index,
    check_size,
    count_weights,
    find_shards,
    index_name,
    open_shard,
    packed_headers,
)
from optimum_dsa.common.shard_writer import ShardWriter
from optimum_dsa.packed.bitmask import pack


def model_of(parameters):
    """A model of so many parameters that takes no memory."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(parameters, device="meta"))
    return model


@pytest.mark.parametrize("weights", [0, 1000, 10**9])
def test_a_model_is_at_most_three_times_its_checkpoint_and_a_million(weights):
    limit = 3 * weights + 2**20
    check_size(model_of(limit), weights, "here")
    with pytest.raises(
        ValueError, match=f"of here asks for {limit + 1:,} parameters, and the checkpoint has {weights:,}"
    ):
        check_size(model_of(limit + 1), weights, "here")


def test_weights_are_counted_with_their_zeros(tmp_path):
    zeros = torch.zeros(64, 33)
    zeros[0] = 1
    tensors = {"packed": pack(zeros), "plain": torch.ones(5, 7), "bytes": torch.ones(9, dtype=torch.uint8)}
    tensors |= {"scalar": torch.tensor(1.0), "none": torch.zeros(0, 4), "table": torch.ones(3, 9, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "a.safetensors")
    headers = packed_headers(tmp_path / "a.safetensors")
    assert headers.keys() == {"packed"} and headers["packed"].shape == (64, 33) and headers["packed"].kept == 33
    assert count_weights(tmp_path / "a.safetensors") == 64 * 33 + 35 + 9 + 1 + 0 + 27


@pytest.mark.parametrize("stem,encoding", [("model", DENSE), ("dsa_model", BITMASK)])
def test_one_file_or_an_index_of_many(tmp_path, stem, encoding):
    with pytest.raises(FileNotFoundError, match="holds no weights: neither model.safetensors nor dsa_model"):
        find_shards(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / f"{stem}.safetensors")
    assert find_shards(tmp_path) == Shards(tmp_path, encoding, (f"{stem}.safetensors",))
    for name in ("y", "x"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"y": "y.safetensors", "x": "x.safetensors", "z": "y.safetensors"}}
    (tmp_path / index_name(stem)).write_text(json.dumps(index))
    assert find_shards(str(tmp_path)) == Shards(tmp_path, encoding, ("x.safetensors", "y.safetensors"), index)


@pytest.mark.parametrize("form", ["file", "index"])
def test_both_forms_at_once_are_refused(tmp_path, form):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    name = "dsa_model.safetensors" if form == "file" else index_name("dsa_model")
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="dense and compressed weights, which may differ"):
        find_shards(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"])
def test_pickles_are_named_and_not_read(tmp_path, suffix):
    (tmp_path / f"weights{suffix}").write_text("x")
    with pytest.raises(FileNotFoundError, match=f"weights in weights{suffix} only. That is a pickle"):
        find_shards(tmp_path)


@pytest.mark.parametrize("index", [None, [], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "a"}])
def test_what_is_no_index(tmp_path, index):
    with pytest.raises(ValueError, match="is no index of weights"):
        check_index(index, tmp_path / "index.json")


@pytest.mark.parametrize("file", ["../a.safetensors", "b/a.safetensors", "b\\a.safetensors", "a.bin", 3, None])
def test_an_index_names_files_beside_it(tmp_path, file):
    (tmp_path / "a.safetensors").touch()
    assert check_index({"weight_map": {"w": "a.safetensors"}}, tmp_path / "index.json") == ("a.safetensors",)
    with pytest.raises(ValueError, match="puts w into .*beside their index only"):
        check_index({"weight_map": {"v": "a.safetensors", "w": file}}, tmp_path / "index.json")
    with pytest.raises(FileNotFoundError, match="names b.safetensors, which is not there"):
        check_index({"weight_map": {"v": "b.safetensors"}}, tmp_path / "index.json")


def test_what_is_written_tensor_by_tensor_is_what_safetensors_reads(tmp_path):
    tensors = {
        "f64": torch.randn(3, dtype=torch.float64), "f32": torch.randn(2, 3), "bf16": torch.randn(2, 2).bfloat16(),
        "f16": torch.randn(5).half(), "u8": torch.arange(7, dtype=torch.uint8), "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, 3), "turned": torch.randn(3, 4).t(), "i64": torch.arange(4),
    }  # fmt: skip
    path = tmp_path / "a.safetensors"
    with ShardWriter(path, list(tensors), {"format": "pt", "by": "us"}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor, "I64" if name == "i64" else None)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "by": "us"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # data begin where any type may


def test_long_names_and_large_shapes_find_room_in_the_header(tmp_path):
    names = [f"{'layers.' * 40}ü{number}" for number in range(30)]
    with ShardWriter(tmp_path / "a.safetensors", names, None) as writer:
        for name in names:
            writer.add(name, torch.zeros(1, 1, 1, 1, 1, 1, 1, 1))
    assert sorted(load_file(tmp_path / "a.safetensors")) == sorted(names)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert not file.metadata()


def test_a_file_whose_writing_failed_is_none(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / "a.safetensors", ["a"], None) as writer:
        writer.add("a", torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="is not a safetensors file"), open_shard(tmp_path / "a.safetensors"):
        pass
