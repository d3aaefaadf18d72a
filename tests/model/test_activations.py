"""Activations on the disk: what was written comes back, and a prune gives the same with them, bit for bit."""

import os
from pathlib import Path

import pytest
import torch

from optimum_dsa import DSAConfig, ReconstructConfig, UpdateConfig, allocate, prune
from optimum_dsa.model import activations
from optimum_dsa.model.activations import OnDisk, Spill, held_in, spilled_to

from ..tiny import same_state, state, tiny_llama, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_what_was_written_comes_back_with_its_strides(dtype, tmp_path):
    values = torch.randn(2, 3, 4, 5).mul(9).to(dtype)
    given = [values, values.transpose(1, 3), values[1:, :, ::2], values[0, 0, 0, 0], torch.empty(0, 3, dtype=dtype)]
    held = OnDisk(Spill(tmp_path), [*given, None])
    for value, found in zip(given, held):
        assert found.dtype == dtype and torch.equal(found, value)
    assert held[1].stride() == given[1].stride() and held[5] is None and len(held) == 6
    assert not any(tmp_path.iterdir())  # no name that could be left behind


def test_places_are_used_again_and_a_copy_keeps_its_own():
    spill = Spill()
    held = OnDisk(spill, [torch.full((64,), float(number)) for number in range(3)])
    grown = spill.bytes
    for number in range(3):
        held[number] = held[number] + 10
    assert spill.bytes == grown  # what it had was written over
    before = held.copy()
    held[1] = held[1] + 10
    assert [value[0].item() for value in before] == [10, 11, 12] and held[1][0] == 21 and spill.bytes > grown
    del before
    held.append(torch.zeros(64))
    assert spill.bytes == 4 * 256 and held.pop().sum() == 0 and len(held) == 3


def test_a_file_that_was_cut_is_told(tmp_path):
    held = OnDisk(Spill(tmp_path), [torch.ones(100)])
    os.truncate(held._spill._file.fileno(), 40)
    with pytest.raises(OSError, match="end at byte 40"):
        held[0]


CONFIGS = {
    "wanda": {"allocation": "owl"},
    "one pass": {"sequential": False},
    "dense targets": {
        "method": "sparsegpt",
        "allocation": "uniform",
        "update": UpdateConfig(targets="dense", true_sequential=True, residual=True),
    },
    "head": {"include": ["lm_head"], "update": UpdateConfig("refit")},
    "trained in pairs": {"reconstruct": ReconstructConfig(4, span=2)},
    "trained in parts": {"reconstruct": ReconstructConfig(4, apart=True)},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prune_gives_the_same_from_the_disk(name, monkeypatch):
    made = []
    monkeypatch.setattr(activations, "OnDisk", lambda *args: made.append(OnDisk(*args)) or made[-1])
    config, there, elsewhere = DSAConfig(0.6, batch_size=3, **CONFIGS[name]), tiny_llama(), tiny_llama()
    expected = prune(there, tokens(), config)
    assert not made
    found = prune(elsewhere, tokens(), DSAConfig.from_dict({**config.to_dict(), "activations": "disk"}))
    assert same_state(elsewhere, state(there)) and made and max(map(len, made)) > 1
    assert found.allocation == expected.allocation and found.reconstruction == expected.reconstruction


def test_the_file_lies_where_the_checkpoints_are(tmp_path, monkeypatch):
    asked = []
    real = activations.tempfile.TemporaryFile
    monkeypatch.setattr(
        activations.tempfile, "TemporaryFile", lambda dir, buffering: asked.append(dir) or real(dir=dir)
    )
    config = DSAConfig(0.6, activations="disk")
    prune(tiny_llama(), tokens(), config, tmp_path / "blocks")
    assert {Path(folder) for folder in asked} == {tmp_path / "blocks"} and len(asked) == 2
    allocate(tiny_llama(), tokens(), config)
    with spilled_to(tmp_path):
        held_in("disk")([torch.ones(1)])
    assert asked[2:] == [None, tmp_path]


def test_another_place_is_refused():
    with pytest.raises(ValueError, match="activations.*'memory' or 'disk'"):
        DSAConfig(0.5, activations="tape")
