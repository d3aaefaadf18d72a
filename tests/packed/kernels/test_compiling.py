"""Kernels are compiled whole or not at all."""

import pytest

from optimum_dsa.packed.kernels.compiling import NoCompiler, compile_library


def test_a_library_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NoCompiler, match="no such instruction"):
        compile_library(tmp_path / "made" / "kernels.so")
    assert not list((tmp_path / "made").iterdir())
