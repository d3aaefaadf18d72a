"""Kernels are found, forced or missed, and it is said why."""

import logging
import os

import pytest

from optimum_dsa.packed import loading


def test_an_instruction_set_that_is_not_here_is_refused(kernels, monkeypatch):
    with pytest.raises(ValueError, match="No kernels for 'sse'.*Known: .*scalar, reference"):
        loading.use("sse")
    monkeypatch.setenv("OPTIMUM_DSA_KERNELS", "sse")
    with pytest.raises(
        ValueError, match="OPTIMUM_DSA_KERNELS=sse: none of that name runs on this processor. There are .*, reference"
    ):
        loading._look(compile=True)
    monkeypatch.setenv("OPTIMUM_DSA_KERNELS", "scalar")
    assert loading._look(compile=True).name == "scalar"
    assert kernels.name == kernels.runnable[0] and os.fspath(kernels.path).endswith(".so")


def test_without_a_compiler_the_reference_serves_and_says_so_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(loading, "cached", lambda: tmp_path / "none.so")
    monkeypatch.setattr(loading, "_found", None)
    monkeypatch.setattr(loading, "_warned", False)
    with caplog.at_level(logging.WARNING):
        found = [loading.load(compile=True), loading.load()]
    assert {one.name for one in found} == {"reference"} and "no C++ compiler" in found[0].reason
    assert len(caplog.records) == 1 and "OPTIMUM_DSA_JIT=1" in caplog.text
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("OPTIMUM_DSA_KERNELS", "avx2")
    with pytest.raises(ValueError, match="OPTIMUM_DSA_KERNELS=avx2, but there are no kernels"):
        loading._look(compile=True)
