"""A safetensors file that is written tensor by tensor is read by everybody as it was meant."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from optimum_dsa.common.shard_writer import ShardWriter, width, write_tensors


TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]
TYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.int16, torch.uint8]


def test_tensors_of_every_type_come_back_and_lie_where_they_may_be_read_in_place(tmp_path):
    values = {f"a{number}": torch.randn(3, 5).mul(4).to(dtype) for number, dtype in enumerate(TYPES)}
    values["scalar"] = torch.tensor(2.0)
    write_tensors(values, tmp_path / "a.safetensors", {"format": "pt", "of": "a block"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        mine, wanted = (tensor.reshape(-1).view(torch.uint8) for tensor in (found[name], value))
        assert torch.equal(mine, wanted)
        assert found[name].data_ptr() % value.itemsize == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "of": "a block"}


def test_what_comes_later_lies_where_room_was_kept(tmp_path):
    numbers, scales, last = torch.arange(3, dtype=torch.int8), torch.randn(5, 1).bfloat16(), torch.ones(2).bool()
    with ShardWriter(tmp_path / "a", ["scales", "numbers", "last"], None) as writer:
        writer.reserve("scales", (5, 1), torch.bfloat16)
        writer.reserve("numbers", (3,), torch.int8)
        writer.add("last", last)
        writer.fill("numbers", numbers)
        writer.fill("scales", scales)
    found = load_file(tmp_path / "a")
    assert torch.equal(found["scales"], scales) and torch.equal(found["numbers"], numbers)
    assert torch.equal(found["last"], last)


def test_room_that_was_kept_is_filled(tmp_path):
    with pytest.raises(AssertionError, match="never filled: a"), ShardWriter(tmp_path / "a", ["a"], None) as writer:
        writer.reserve("a", (3,), torch.int8)


def test_a_file_that_was_not_brought_to_its_end_has_no_header(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / "a", ["a"], None) as writer:
        writer.add("a", torch.ones(4))
        raise KeyError
    assert int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") == 0
    assert [width(name) for name in ("BF16", "F8_E4M3", "I64", "BOOL")] == [2, 1, 8, 1]
