"""Folders from strangers: what is no checkpoint, or a malicious one, is refused before it costs anything."""

import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_dsa import DSAConfig, DSAPruner, convert
from optimum_dsa.checkpoint.encodings import BITMASK
from optimum_dsa.checkpoint.shards import index_name, packed_headers
from optimum_dsa.common.files import LARGEST_JSON
from optimum_dsa.packed.bitmask import LARGEST

from .tiny import tiny_llama


INDEX = index_name(BITMASK.stem)


def refused(folder, tmp_path, message):
    """Converting and loading both refuse `folder`, without memory growing."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, OSError), match=message):
        convert(folder, tmp_path / "out", "dense")
    with pytest.raises((ValueError, OSError), match=message):
        DSAPruner.from_pretrained(folder)
    assert not (tmp_path / "out").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KB; a bomb would take gigabytes


@pytest.fixture
def bad(tmp_path):
    """A compressed Llama to be damaged."""
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "bad", compressed=True, max_shard_size="20KB")
    return tmp_path / "bad"


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/secret.safetensors", "a\\b.safetensors", "x.bin", 7, None]
)
def test_an_index_that_points_elsewhere(bad, tmp_path, place):
    save_file({"a": torch.zeros(4)}, tmp_path / "secret.safetensors")
    index = json.loads((bad / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = place
    (bad / INDEX).write_text(json.dumps(index))
    refused(bad, tmp_path, "beside their index only")


@pytest.mark.parametrize(
    "content,message",
    [
        ("[" * 200_000, "nested too deep"),
        ('{"weight_map": ' * 100_000, "nested too deep"),
        ('{"weight_map": {"a": ' + "9" * 100_000 + "}}", "is not JSON"),
        ("{", "is not JSON"),
        ("\x00\xff", "is not JSON"),
        ("[]", "is no index of weights"),
        ('{"weight_map": {}}', "is no index of weights"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "which is not there"),
    ],
)  # fmt: skip
def test_an_index_that_is_none(bad, tmp_path, content, message):
    (bad / INDEX).write_bytes(content.encode("latin-1"))
    refused(bad, tmp_path, message)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_json_that_is_too_large_is_not_read(bad, tmp_path, name):
    with (bad / name).open("wb") as file:
        file.truncate(LARGEST_JSON + 1)  # a hole: it takes no disk
    refused(bad, tmp_path, "no file of this kind needs more")


def test_a_pickle_under_the_name_of_a_shard(bad, tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(ran),))

    shard = next(bad.glob("*.safetensors"))
    shard.write_bytes(pickle.dumps(Evil()) + bytes(100))
    refused(bad, tmp_path, "is not a safetensors file")
    assert not ran.exists()


def test_pickles_only(bad, tmp_path):
    for path in (*bad.glob("*.safetensors"), bad / INDEX):
        path.unlink()
    torch.save({"a": torch.zeros(4)}, bad / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin only. That is a pickle"):
        convert(bad, tmp_path / "out", "dense")
    with pytest.raises(FileNotFoundError, match="That is a pickle"):
        DSAPruner.from_pretrained(bad)


def change_header(shard, name, place, value):
    """Overwrite one number in the header of a packed tensor."""
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    assert place < LARGEST // 8
    data[begin + 8 * place : begin + 8 * place + 8] = value.to_bytes(8, "little", signed=True)
    shard.write_bytes(data)


@pytest.mark.parametrize("place,value", [(1, 77), (2, 10**12), (3, 10**6), (4, 2**40), (5, 2**62), (4, -1)])
def test_a_packed_tensor_that_promises_too_much(bad, tmp_path, place, value):
    for shard in bad.glob("*.safetensors"):
        for name in packed_headers(shard):
            change_header(shard, name, place, value)
    refused(bad, tmp_path, "is damaged")


def test_a_mask_that_keeps_another_number_is_said_in_our_words_beside_those_of_transformers(bad, tmp_path, caplog):
    shard = next(shard for shard in bad.glob("*.safetensors") if packed_headers(shard))
    tensors = load_file(shard)
    name = next(iter(packed_headers(shard)))
    tensors[name][LARGEST] ^= 1  # in the mask, which comes behind the header
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot be loaded .*issues during automatic conversion"):
        DSAPruner.from_pretrained(bad)
    assert f"{name} is damaged: its mask keeps" in caplog.messages[0]
    with pytest.raises(ValueError, match=f"{name} .*is damaged: its mask keeps"):
        convert(bad, tmp_path / "out", "dense")


def test_a_mask_of_the_wrong_length(bad, tmp_path):
    shard = next(shard for shard in bad.glob("*.safetensors") if packed_headers(shard))
    tensors = load_file(shard)
    name = next(iter(packed_headers(shard)))
    tensors[name] = tensors[name][:-8].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(bad, tmp_path, "is damaged")


def test_a_truncated_shard(bad, tmp_path):
    shard = max(bad.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(bad, tmp_path, "is not a safetensors file")


def test_a_huge_shape_in_a_dense_file(tmp_path):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2**40, 2**20], "data_offsets": [0, 2**61]}}).encode()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        convert(folder, tmp_path / "out", "compressed")


@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_a_config_that_asks_for_more_than_the_weights(bad, tmp_path, form):
    folder = bad
    if form == "dense":
        convert(bad, tmp_path / "dense", "dense")
        folder = tmp_path / "dense"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 10**10}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="asks for 320,.* parameters or more, and the checkpoint has"):
        DSAPruner.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def test_two_forms_in_one_folder(bad, tmp_path):
    convert(bad, tmp_path / "in", "dense")
    for path in bad.glob("dsa_model*"):
        shutil.copy(path, tmp_path / "in")
    for use in (
        lambda: convert(tmp_path / "in", tmp_path / "out", "dense"),
        lambda: DSAPruner.from_pretrained(tmp_path / "in"),
    ):
        with pytest.raises(ValueError, match="holds dense and compressed weights"):
            use()


def test_a_link_out_of_the_folder_is_not_copied(bad, tmp_path):
    (tmp_path / "secret").write_text("key")
    (bad / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="link out of its folder"):
        convert(bad, tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_the_index_names_and_no_shard_has(bad, tmp_path):
    index = json.loads((bad / INDEX).read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    (bad / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks ghost"):
        convert(bad, tmp_path / "out", "dense")
