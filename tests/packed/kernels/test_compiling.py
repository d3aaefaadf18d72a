"""Kernels are compiled whole or not at all."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from optimum_dsa.packed.kernels.compiling import HERE, NoCompiler, compile_library, sources


def test_a_library_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NoCompiler, match="no such instruction"):
        compile_library(tmp_path / "made" / "kernels.so")
    assert not list((tmp_path / "made").iterdir())


@pytest.fixture(scope="module")
def wheel(library, tmp_path_factory):
    """The distribution `optimum-dsa-kernels`, built from a copy of its folder and unpacked; it is compiled already."""
    pytest.importorskip("setuptools.command.bdist_wheel")
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copytree(HERE, folder / "packed" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "common").mkdir()
    shutil.copy(HERE.parents[1] / "common" / "version.py", folder / "common")
    (folder / "c++").write_text(f'#!/bin/sh\nfor last; do :; done\ncp {library} "$last"\n')  # a compiler that knows
    (folder / "c++").chmod(0o755)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run(
        [*build, str(folder / "packed" / "kernels")],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": str(folder / "c++")},
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    assert re.fullmatch(r"optimum_dsa_kernels-[\d.]+-py3-none-\w+\.whl", built.name)
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_is_found_and_used_by_the_package(wheel):
    """In a process of its own, as a library is loaded once; so is one in a folder."""
    code = "from optimum_dsa.packed.loading import load; print(load().name, '|', load().reason)"
    for given, reason in (
        ({"PYTHONPATH": str(wheel)}, "the distribution optimum-dsa-kernels"),
        ({"OPTIMUM_DSA_KERNELS_PATH": str(wheel)}, f"OPTIMUM_DSA_KERNELS_PATH={wheel}"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=HERE.parents[2],
            env={**os.environ, **given},
        )
        name, said = done.stdout.strip().split(" | ")
        assert name in ("avx512_bf16", "avx512", "avx2", "neon", "scalar") and said == reason, done.stderr


def test_the_project_names_every_source():
    """`build.toml` lists what is compiled: a file that is left out there would be missing where others build it."""
    listed = set(re.findall(r'"((?:packed|torch-ext)/[\w.]+)"', (HERE / "build.toml").read_text()))
    files = [*sources(), *HERE.glob("packed/*.h"), *HERE.glob("torch-ext/*.h")]
    assert listed == {path.relative_to(HERE).as_posix() for path in files}
