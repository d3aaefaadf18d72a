"""The library of GPU kernels is found, compiled where that is allowed, and told where it cannot be."""

import ctypes
import os

import pytest
import torch

from optimum_dsa.packed import cuda, nvcc


def test_without_leave_or_a_compiler_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.delenv("OPTIMUM_DSA_JIT", raising=False)
    monkeypatch.setenv("OPTIMUM_DSA_KERNELS_PATH", str(tmp_path))
    assert nvcc.library_for("80") is None and cuda.kernels(torch.device("cpu")) is None
    (tmp_path / nvcc.file_name("90")).touch()
    assert nvcc.library_for("90") == tmp_path / nvcc.file_name("90")
    monkeypatch.setenv("OPTIMUM_DSA_JIT", "1")
    monkeypatch.setattr(nvcc, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(nvcc, "build", lambda architecture: architecture)
    assert nvcc.library_for("80") == "80"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / nvcc.file_name("80")).touch()
    assert nvcc.library_for("80") == tmp_path / "cache" / nvcc.file_name("80")
    assert nvcc.described("80") == str(tmp_path / "cache" / nvcc.file_name("80"))
    assert nvcc.described("70").startswith(f"none of sm_70 in {tmp_path} or {tmp_path / 'cache'}; ")
    monkeypatch.undo()
    monkeypatch.setattr(nvcc, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="No nvcc was found"):
        nvcc.build("80", tmp_path)
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\necho its own words >&2; exit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(nvcc, "compiler", lambda: failing)
    with pytest.raises(RuntimeError, match="ended with 3: its own words"):
        nvcc.build("80", tmp_path)
    assert [path.name for path in tmp_path.glob("*.so")] == [nvcc.file_name("90")]


@pytest.mark.skipif(not os.environ.get("WITH_NVCC"), reason="takes half a minute; a variable asks for it")
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_nvcc_takes_the_sources(tmp_path, architecture):
    built = nvcc.build(architecture, tmp_path)
    library = ctypes.CDLL(str(built))
    assert library.optimum_dsa_two_of_four and library.optimum_dsa_masked and library.optimum_dsa_unpack
    assert nvcc.build(architecture, tmp_path) == built
