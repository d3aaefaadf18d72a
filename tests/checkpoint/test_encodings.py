"""A row of the table is all that a new encoding takes: a model is saved, loaded, verified and converted through it."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa import ENCODINGS, DSAConfig, DSAPruner, Encoding, convert
from optimum_dsa.checkpoint.encodings import BITMASK, DENSE, decoded, encoding_in, encoding_named
from optimum_dsa.checkpoint.layouts import LAYOUTS, Layout, layout_of
from optimum_dsa.checkpoint.load import load_model
from optimum_dsa.checkpoint.shards import find_shards, packed_headers
from optimum_dsa.commands.convert import ConvertCommand

from ..tiny import needs_compressed_loading, same_state, state, tiny_llama, tokens
from .test_convert import raw
from .test_verify import run


# -- a toy: the places of the weights that are kept, and the weights

MAGIC = int.from_bytes(b"TOYINDEX", "little")
KINDS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class IndexHeader:
    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: int

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def bytes(self):
        return 8 * (4 + len(self.shape) + self.kept) + self.kept * self.dtype.itemsize


def encode(tensor):
    if tensor.dtype not in KINDS or not 0 < tensor.dim() <= 2:
        return None
    flat = tensor.flatten()
    places = flat.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).nonzero().flatten()
    facts = torch.tensor([MAGIC, KINDS.index(tensor.dtype), len(places), tensor.dim(), *tensor.shape])
    parts = [facts.view(torch.uint8), places.view(torch.uint8), flat[places].contiguous().view(torch.uint8)]
    found = torch.cat(parts)
    return found if len(found) < tensor.nbytes else None


def read_header(start, length, name):
    facts = np.frombuffer(start[: len(start) // 8 * 8], "<i8").tolist()
    if len(facts) < 5 or facts[0] != MAGIC:
        return None
    header = IndexHeader(KINDS[facts[1]], tuple(facts[4 : 4 + facts[3]]), facts[2])
    if header.bytes != length:
        raise ValueError(f"{name} is damaged.")
    return header


def decode(stored, name):
    header = read_header(stored[:48].numpy().tobytes(), len(stored), name)
    start = 8 * (4 + len(header.shape))
    places = stored[start : start + 8 * header.kept].clone().view(torch.int64)
    values = stored[start + 8 * header.kept :].clone().view(header.dtype)
    return torch.zeros(header.size, dtype=header.dtype).index_put((places,), values).view(header.shape)


@pytest.fixture
def sparse_index():
    ENCODINGS.add("sparse_index", Encoding("sparse_index", "toy_model", encode, decode, read_header, 48))
    yield ENCODINGS["sparse_index"]
    del ENCODINGS["sparse_index"]


@pytest.fixture
def pruned(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.9))
    pruner.save_pretrained(tmp_path / "dense")
    return pruner


def test_a_row_saves_loads_verifies_and_converts(sparse_index, pruned, tmp_path, capsys):
    before = state(pruned.model)
    pruned.save_pretrained(tmp_path / "toy", encoding="sparse_index")
    assert find_shards(tmp_path / "toy").encoding is sparse_index
    assert any(packed_headers(path) for path in (tmp_path / "toy").glob("toy_model-*.safetensors"))
    said = json.loads((tmp_path / "toy" / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "optimum-dsa", "format_version": 1, "encoding": "sparse_index"}
    for target in ("dense", "bitmask"):
        convert(tmp_path / "toy", tmp_path / target, target)
        assert find_shards(tmp_path / target).encoding.name == target
        convert(tmp_path / target, tmp_path / f"{target}-again", "sparse_index")
        assert raw(tmp_path / f"{target}-again") == raw(tmp_path / "toy")
    assert same_state(load_model(str(tmp_path / "dense")), before)
    assert same_state(pruned.model, before)
    assert run(capsys, "convert", tmp_path / "toy", tmp_path / "by-command", "--to", "compressed")[0] == 0
    assert run(capsys, "convert", tmp_path / "toy", tmp_path / "x", "--to", "sparse_index")[0] == 2  # it is already


@needs_compressed_loading
def test_a_row_loads_and_verifies(sparse_index, pruned, tmp_path, capsys):
    pruned.save_pretrained(tmp_path / "toy", encoding="sparse_index")
    again = DSAPruner.from_pretrained(tmp_path / "toy")
    assert same_state(again.model, state(pruned.model)) and again.verify().holds
    assert run(capsys, "verify", tmp_path / "toy")[0] == 0
    del ENCODINGS["sparse_index"]
    try:
        with pytest.raises(ValueError, match="sparse_index"):
            load_model(str(tmp_path / "toy"))
    finally:
        ENCODINGS.add("sparse_index", sparse_index)


def test_compressed_is_a_name_of_bitmask(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "a", compressed=True)
    pruned.save_pretrained(tmp_path / "b", encoding="bitmask")
    assert raw(tmp_path / "a") == raw(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    assert encoding_named("compressed") is encoding_named("bitmask") is BITMASK
    with pytest.raises(ValueError, match="'compressed' or 'quantised', got 'zip'"):
        pruned.save_pretrained(tmp_path / "c", encoding="zip")
    with pytest.raises(ValueError, match="do not fit"):
        pruned.save_pretrained(tmp_path / "c", compressed=True, encoding="other")
    assert not (tmp_path / "c").exists() and "compressed" in ConvertCommand.DESCRIPTION


# -- laws of every row


@pytest.mark.parametrize("name", sorted(ENCODINGS))
@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_what_is_stored_comes_back_bit_for_bit_and_says_what_it_is(name, shape, kind, share, seed):
    row, generator = ENCODINGS[name], torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(kind) * (torch.rand(shape, generator=generator) > share)
    stored = None if row.encode is None else row.encode(tensor)
    if stored is None:
        assert decoded(tensor) is None
        return
    assert stored.dtype == torch.uint8 and stored.dim() == 1 and len(stored) < tensor.nbytes
    again = decoded(stored)
    assert again.dtype == kind and again.shape == tensor.shape
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))
    header = row.read_header(stored[: row.header_bytes].numpy().tobytes(), len(stored), "w")
    assert (header.dtype, header.shape, header.size, header.bytes) == (kind, tensor.shape, tensor.numel(), len(stored))


def test_every_row_has_files_and_a_name_of_its_own():
    rows = ENCODINGS.values()
    assert len({row.stem for row in rows}) == len(rows) == len({row.shown for row in rows})
    assert all(ENCODINGS[row.name] is row and encoding_in({"quantization_config": row.entry}) is row for row in rows)
    assert encoding_in({}) is encoding_in(None) is DENSE and encoding_in({"quantization_config": "gptq"}) is None


def test_a_layout_that_fits_goes_before_the_plain_one():
    assert layout_of({"model_type": "llama"}) is LAYOUTS["plain"] is layout_of(None)
    LAYOUTS.add("odd", Layout(lambda stated: "odd_widths" in stated, lambda config, where: None))
    try:
        assert layout_of({"odd_widths": [1]}) is LAYOUTS["odd"] and layout_of({}) is LAYOUTS["plain"]
    finally:
        del LAYOUTS["odd"]
