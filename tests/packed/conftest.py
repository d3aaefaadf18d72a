"""Kernels, compiled from the sources as they are."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from optimum_dsa.packed import loading, nvcc
from optimum_dsa.packed.kernels.compiling import NoCompiler, compile_library, compiler, file_name


ROOT = Path(__file__).resolve().parents[2]
HERE = ("neon",) if platform.machine() in ("aarch64", "arm64") else ("avx512_bf16", "avx512", "avx2")


@pytest.fixture(scope="session")
def library():
    """The library, compiled once for all runs: seven times as long as all that is tested with it."""
    path = ROOT / "build" / "kernels" / file_name()
    try:
        compiler()
    except NoCompiler as missing:
        pytest.skip(str(missing))
    return path if path.is_file() else compile_library(path)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The library of a GPU's kernels, whose sources run on a CPU, see `emulator.h`."""
    if (found := shutil.which("g++")) is None:
        pytest.skip("no g++ to compile the emulator with")
    made = tmp_path_factory.mktemp("emulator") / "emulated.so"
    command = [found, "-O1", "-std=c++20", "-fPIC", "-shared", "-DEMULATED", f"-I{Path(__file__).parent}", "-x", "c++"]
    done = subprocess.run([*command, *nvcc.sources(), "-o", made], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return made


@pytest.fixture(scope="module")
def kernels(library):
    """The kernels in use; the reference again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "cached", lambda: library)
        patch.setattr(loading, "_found", None)
        yield loading.load(compile=True)
        loading.use("reference")


@pytest.fixture(params=(*HERE, "scalar", "reference"))
def name(request, kernels):
    """Each instruction set in its turn."""
    if request.param not in (*kernels.runnable, "reference"):
        pytest.skip(f"this processor has no {request.param}")
    loading.use(request.param)
    return request.param
