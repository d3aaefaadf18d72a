"""What was measured of a dense model is kept, and never given for another model, text or state."""

from dataclasses import replace

import pytest
from huggingface_hub import constants

from optimum_dsa.evaluation.kept import measured_once
from optimum_dsa.evaluation.measurement import Measurement, Protocol, TaskProtocol


LIKE = Measurement("out", 0.6, 10, 12.0, 0.1, Protocol("test.txt", 3, 16, fingerprint="f"), (1.0, 2.0, 3.0))
DENSE = replace(LIKE, model="dense", sparsity=0.0, perplexity=9.0)


@pytest.fixture
def dense(tmp_path, monkeypatch):
    """A folder that could be a model's."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def asked(dense, like=LIKE, found=DENSE):
    """What comes back, and how often it was measured."""
    calls = []
    return measured_once(str(dense), like, lambda: calls.append(1) or found), len(calls)


def test_a_model_is_measured_once_by_each_protocol(dense):
    assert asked(dense) == (DENSE, 1)
    assert asked(dense) == (DENSE, 0)
    other = replace(LIKE, protocol=replace(LIKE.protocol, fingerprint="g"))
    assert asked(dense, other, replace(DENSE, protocol=other.protocol))[1] == 1
    tasks = {"tasks": {"boolq": {"acc": {"value": 0.5, "error": None}}}, "task_protocol": TaskProtocol(0)}
    assert asked(dense, replace(LIKE, **tasks), replace(DENSE, **tasks))[1] == 1
    assert [asked(dense, like)[1] for like in (LIKE, other, replace(LIKE, **tasks))] == [0, 0, 0]


def test_a_folder_that_was_changed_is_measured_again(dense):
    asked(dense)
    (dense / "model.safetensors").write_bytes(b"xy")
    assert asked(dense)[1] == 1


def test_what_cannot_be_read_is_measured_again(dense, tmp_path):
    asked(dense)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text("{")
    assert asked(dense) == (DENSE, 1)
    assert asked(dense) == (DENSE, 0)
