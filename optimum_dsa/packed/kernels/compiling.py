"""Compiles the kernels into one shared library. Of the standard library and torch alone, as the wheel uses it too."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


HERE = Path(__file__).parent
CONTRACT = 1  # of the operators: raised whenever their arguments or their meaning change
OPTIONS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-w")
# The oldest torch whose stable interface is asked for: 2.10.
TARGET = "-DTORCH_TARGET_VERSION=((2ULL<<56)|(10ULL<<48))"


class NoCompiler(RuntimeError):
    """There is no compiler, or it failed."""


def sources() -> list[Path]:
    """All C++ sources, in a stable order."""
    return sorted([*HERE.glob("packed/*.cpp"), *HERE.glob("torch-ext/*.cpp")])


def fingerprint() -> str:
    """Of the sources and of how they are compiled, 12 letters."""
    digest = hashlib.sha256(" ".join((*OPTIONS, TARGET, str(CONTRACT))).encode())
    for path in sorted([*sources(), *HERE.glob("packed/*.h"), *HERE.glob("torch-ext/*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def compiler() -> str:
    """The C++ compiler: `CXX` of the environment, else the first of g++, c++ and clang++ on the path.

    Raises:
        NoCompiler: there is none, or none of the options are known to it, as on Windows.
    """
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else ["g++", "c++", "clang++"])), None)
    if found is None or sys.platform == "win32":
        raise NoCompiler(
            f"no C++ compiler ({named or 'g++, c++, clang++'}) on the path of this {sys.platform} machine"
        )
    return found


def file_name() -> str:
    """Unlike that of any other sources, torch or processor."""
    import torch

    release = torch.__version__.split("+")[0]
    return f"optimum_dsa_kernels-{fingerprint()}-torch{release}-{platform.machine()}.so"


def compile_library(target: Path) -> Path:
    """Compiles all sources into the library `target`, which is there whole or not at all.

    Raises:
        NoCompiler: there is no compiler, or it failed; with what it said.
    """
    import torch

    program, root = compiler(), Path(torch.__file__).parent
    options = [
        *OPTIONS,
        TARGET,
        f"-DTORCH_EXTENSION_NAME=optimum_dsa_kernels_{fingerprint()}",
        f"-I{root / 'include'}",
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        objects = [Path(folder) / f"{path.stem}.o" for path in sources()]
        commands = [[program, *options, "-c", str(path), "-o", str(made)] for path, made in zip(sources(), objects)]
        with ThreadPoolExecutor(max(os.cpu_count() or 1, 1)) as pool:
            list(pool.map(_run, commands))
        whole = Path(folder) / target.name
        loose = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *loose]
        _run([program, "-shared", *map(str, objects), *libraries, "-o", str(whole)])
        os.replace(whole, target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoCompiler(f"{command[0]} failed on {Path(command[-3]).name}:\n{done.stderr[-2000:]}")
