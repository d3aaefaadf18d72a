"""What stands between a model and lm-eval: how many requests go at once, and how far they are."""

import os

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from optimum_dsa.common import progress
from optimum_dsa.evaluation import harness
from optimum_dsa.evaluation.harness import Counted, beside, fitting, no_bars, no_repository, requests_kept

from ..tiny import tiny_llama


def test_a_batch_fits_in_a_part_of_the_memory_and_is_a_power_of_two(monkeypatch):
    model = tiny_llama()
    token = model.config.vocab_size * 8 + 16 * model.config.hidden_size * 4
    for windows, expected in ((0.5, 1), (1, 1), (3, 2), (7.9, 4), (1000, 16)):
        monkeypatch.setattr(harness, "memory_available", lambda _, n=windows: int(n * 128 * token * harness.SHARE))
        assert fitting("auto", model, 128) == expected
    assert fitting(3, model, 128) == 3


def test_half_the_bytes_of_a_number_take_more_windows(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(harness, "memory_available", lambda _: 2**20)
    assert fitting("auto", model.to(torch.bfloat16), 128) >= fitting("auto", tiny_llama(), 128)


def test_long_requests_count_for_more(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    enable_progress_bars()
    try:
        long, short = ("x" * 897, "yy"), ("x" * 97, "yy")  # 900 and 100 with what every request takes
        with Counted([long, short]) as counted:
            now[0] = 45.0
            counted.add_partial("loglikelihood", long, None)
            now[0] = 50.0
            counted.add_partial("loglikelihood", short, None)
    finally:
        disable_progress_bars()
    assert capsys.readouterr().err.splitlines() == ["Tasks: 90 %, 45 s, about 5 s left", "Tasks: 100 %, 50 s"]


def test_no_library_draws_bars_of_its_own(capsys):
    with no_bars():
        assert list(tqdm(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(tqdm(range(3))) == [0, 1, 2] and "3/3" in capsys.readouterr().err


def test_what_is_changed_for_a_while_is_as_before(tmp_path):
    cache = pytest.importorskip("lm_eval.caching.cache")
    evaluator = pytest.importorskip("lm_eval.evaluator")
    asks = evaluator.get_git_commit_hash
    with pytest.raises(KeyError), no_repository():
        assert evaluator.get_git_commit_hash() is None
        raise KeyError
    assert evaluator.get_git_commit_hash is asks
    here, before = os.getcwd(), cache.PATH
    with pytest.raises(KeyError), beside(tmp_path), requests_kept(str(tmp_path)) as options:
        assert options == {"cache_requests": True} and str(tmp_path) == cache.PATH
        assert os.path.samefile(os.getcwd(), tmp_path)
        raise KeyError
    assert (os.getcwd(), cache.PATH) == (here, before)
    with requests_kept(None) as options:
        assert options == {} and before == cache.PATH
