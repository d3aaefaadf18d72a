"""Whoever cuts text into windows puts in front what the tokenizer does, says so, and goes without when asked to."""

import json

import pytest

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, RecoveryConfig
from optimum_dsa.search import search as searching

from .tiny import bos_tokenizer, tiny_llama, tokens


# no two windows of it are alike
TEXT = [" ".join(map(str, row)) for row in tokens(60, 40, vocabulary=90).tolist()]
BOS = 0
both = pytest.mark.parametrize("bos,there", [(None, True), (True, True), (False, False)])


def pruner(adds=True):
    return DSAPruner(tiny_llama(), bos_tokenizer(adds))


def asked(bos, **settings):
    return DSAConfig(0.5, data=DataConfig(num_samples=6, sequence_length=8, bos=bos), **settings)


def starts(windows):
    """Whether all windows start with BOS, and nothing else is one; no window has any otherwise."""
    first = (windows[:, 0] == BOS).all()
    assert int((windows == BOS).sum()) == (len(windows) if first else 0)
    return bool(first)


@both
def test_calibration(bos, there, tmp_path):
    one = pruner()
    report = one.prune(TEXT, asked(bos))
    assert f"calibrated on sequences {'that start with' if there else 'without'} BOS" in str(report)
    one.save_pretrained(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "dsa_config.json").read_text())
    assert described["calibration"]["bos"] is there and described["config"]["data"]["bos"] is bos
    assert DSAPruner.from_pretrained(tmp_path / "out").report.calibration["bos"] is there


@both
@pytest.mark.parametrize("validation", [None, TEXT[::-1]])
def test_search(bos, there, validation, monkeypatch):
    seen = []
    monkeypatch.setattr(searching, "search", lambda model, data, tokens, *_, **__: seen.append((data, tokens)))
    pruner().search(TEXT, asked(bos), validation=validation)
    ((data, tokens),) = seen
    assert starts(data.inputs["input_ids"]) is starts(tokens) is data.facts()["bos"] is there


@both
def test_a_search_says_it(bos, there, tmp_path):
    options = {"strategy": "named", "budget": "1k tokens", "output": tmp_path / "found"}
    result = pruner().search(TEXT, asked(bos), **options)
    assert f"on windows {'that start with' if there else 'without'} BOS" in str(result)
    assert json.loads((tmp_path / "found" / "search.json").read_text())["calibration"]["bos"] is there


@both
def test_training(bos, there):
    one = pruner()
    one.prune(TEXT, asked(bos))
    data = DataConfig(sequence_length=8, bos=bos)
    result = one.recover(TEXT, RecoveryConfig("full", steps=1, batch_size=2, validation_windows=2, data=data))
    assert result.to_dict()["data"]["bos"] is there
    assert str(result).endswith(f"on sequences {'that start with' if there else 'without'} BOS")


def test_a_tokenizer_that_adds_none_changes_nothing():
    one, other = pruner(adds=False), pruner(adds=False)
    first, second = one.prune(TEXT, asked(None)), other.prune(TEXT, asked(False))
    assert first.achieved == second.achieved and first.calibration == second.calibration
    weights = zip(one.model.parameters(), other.model.parameters())
    assert all((here == there).all() for here, there in weights)


def test_calibration_with_it_prunes_another_model():
    one, other = pruner(), pruner()
    one.prune(TEXT, asked(None, allocation="uniform"))
    other.prune(TEXT, asked(False, allocation="uniform"))
    weights = zip(one.model.parameters(), other.model.parameters())
    assert any((here != there).any() for here, there in weights)
