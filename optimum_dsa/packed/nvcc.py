"""The library of GPU kernels: carried along, in the cache, or compiled from its sources where that is allowed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from huggingface_hub import constants


SOURCES = Path(__file__).parent / "kernels" / "cuda"


def allowed() -> bool:
    """Whether the user lets kernels be compiled at their first use, with OPTIMUM_DSA_JIT=1."""
    return os.environ.get("OPTIMUM_DSA_JIT", "") == "1"


def cache_folder() -> Path:
    """Where compiled libraries and tables are."""
    return Path(constants.HF_HOME) / "optimum-dsa" / "cuda"


def compiler() -> Path | None:
    """NVIDIA's compiler: in PATH, CUDA_HOME, /usr/local/cuda, or of the package nvidia-cuda-nvcc."""
    places = [Path(found)] if (found := shutil.which("nvcc")) else []
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"), reverse=True)
    places += [home / "bin" / "nvcc" for home in (*homes, Path("/usr/local/cuda"), *packages)]
    return next((place for place in places if place.is_file()), None)


def sources() -> list[Path]:
    """What is compiled into one library."""
    return sorted(SOURCES.glob("*.cu"))


def file_name(architecture: str) -> str:
    """The name of a library, which tells the sources that it was made of."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))).hexdigest()[:16]
    return f"optimum_dsa_cuda-{digest}-sm{architecture}.so"


def library_for(architecture: str) -> Path | None:
    """The library that was carried along, else that of the cache, compiled where it is allowed and needed.

    Raises:
        RuntimeError: it is to be compiled, and cannot be.
    """
    found = library_there(architecture)
    return build(architecture) if found is None and allowed() else found


def library_there(architecture: str) -> Path | None:
    """The library that was carried along, else that of the cache; `None` where neither is there."""
    there = (folder / file_name(architecture) for folder in _folders())
    return next((library for library in there if library.is_file()), None)


def _folders() -> list[Path]:
    carried = os.environ.get("OPTIMUM_DSA_KERNELS_PATH")
    return [*([Path(carried)] if carried else []), cache_folder()]


def described(architecture: str) -> str:
    """Which library serves cards of `architecture`, or why there is none, in words."""
    if (found := library_there(architecture)) is not None:
        return str(found)
    nvcc = compiler()
    way = f"{nvcc} compiles them with OPTIMUM_DSA_JIT=1" if nvcc else "no nvcc was found that could compile them"
    return f"none of sm_{architecture} in {' or '.join(map(str, _folders()))}; {way}"


def build(architecture: str, folder: Path | None = None) -> Path:
    """The library for cards of `architecture` ("80", "90"), compiled if `folder` (the cache) has none of them.

    A folder that is carried to another machine is named there by OPTIMUM_DSA_KERNELS_PATH.

    Raises:
        RuntimeError: there is no compiler, or it failed; its own words are in the message.
    """
    folder = folder or cache_folder()
    library = folder / file_name(architecture)
    if library.is_file():
        return library
    if (nvcc := compiler()) is None:
        raise RuntimeError(
            "No nvcc was found in PATH, CUDA_HOME or /usr/local/cuda; install the CUDA toolkit, or `nvidia-cuda-nvcc` "
            "and what it needs, or go without kernels: products are the same, and slower."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / library.name
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, "-O3", "-std=c++17", "-gencode", target, "-Xcompiler", "-fPIC", "-shared"]
        done = subprocess.run([*command, *sources(), "-o", made], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{nvcc} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
        os.replace(made, library)
    return library
