"""Which kernels multiply with packed matrices on a CPU: looked for once, and said why.

The first of these that is there:

1. the distribution `optimum-dsa-kernels`, in which they are compiled;
2. a library in the folder that `OPTIMUM_DSA_KERNELS_PATH` names, for example one that Hugging Face's `kernels` built;
3. compiled here, once, into a cache, where `OPTIMUM_DSA_JIT=1` or an argument allows it and a compiler is there.

Else the reference in PyTorch serves, which is slower than the dense matrix. `OPTIMUM_DSA_KERNELS` forces an
instruction set (`avx512_bf16`, `avx512`, `avx2`, `neon`, `scalar`), or the `reference`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants

from .kernels.compiling import CONTRACT, NoCompiler, compile_library, file_name


logger = logging.getLogger(__name__)
REFERENCE = "reference"
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Kernels:
    """What multiplies on a CPU.

    Attributes:
        name (`str`): the instruction set, or `reference`.
        path (`Path`, *optional*): the library that is loaded.
        reason (`str`): why this one, in words.
        runnable (`tuple[str, ...]`): the instruction sets this processor and the library have, the best first.
    """

    name: str
    path: Path | None
    reason: str
    runnable: tuple[str, ...] = ()


_found: Kernels | None = None
_warned = False


def load(compile: bool | None = None, warn: bool = True) -> Kernels:
    """The kernels, looked for at the first call.

    Args:
        warn: whether to say it once, where there are none and none were asked for.
        compile: whether they may be compiled on this machine; by default what `OPTIMUM_DSA_JIT` says. A call that
            allows it looks again where there were none.

    Raises:
        ValueError: `OPTIMUM_DSA_KERNELS` names an instruction set that is not there.
    """
    global _found, _warned
    with _LOCK:
        if _found is None or (_found.path is None and compile):
            _found = _look(os.environ.get("OPTIMUM_DSA_JIT") == "1" if compile is None else compile)
    if warn and _found.name == REFERENCE and not _warned and os.environ.get("OPTIMUM_DSA_KERNELS") != REFERENCE:
        _warned = True
        logger.warning(
            "Packed matrices are multiplied with in PyTorch, which is slower than dense ones: %s. Install "
            "optimum-dsa-kernels, set OPTIMUM_DSA_JIT=1 where a C++ compiler is installed, or load the model dense "
            "(run_packed=False) or unpack() it.",
            _found.reason,
        )
    return _found


def use(name: str) -> Kernels:
    """Multiplies with the instruction set `name` from now on, or the `reference`; [`load`] has to have found kernels.

    Raises:
        ValueError: it is not there.
    """
    global _found
    found = load()
    known = (*found.runnable, REFERENCE)
    if name not in known:
        raise ValueError(f"No kernels for {name!r} here ({found.reason}). Known: {', '.join(known)}.")
    if found.path is not None:
        ctypes.CDLL(str(found.path)).optimum_dsa_kernels_use(name.encode())
    _found = Kernels(name, found.path, found.reason, found.runnable)
    return _found


def cached() -> Path:
    """Where kernels that are compiled here are kept."""
    return Path(constants.HF_HOME) / "optimum-dsa" / "kernels" / file_name()


def _look(compile: bool) -> Kernels:
    forced, tried = os.environ.get("OPTIMUM_DSA_KERNELS"), []
    if forced == REFERENCE:
        return Kernels(REFERENCE, None, "OPTIMUM_DSA_KERNELS=reference")
    for path, origin in _libraries(compile, tried):
        try:
            library = _open(path)
        except (OSError, AttributeError, RuntimeError) as error:
            tried.append(f"{path} cannot be loaded ({error})")
            continue
        names = tuple(library.optimum_dsa_kernels_runnable().decode().split())
        if forced and forced not in names:
            library.optimum_dsa_kernels_use(REFERENCE.encode())
            raise ValueError(
                f"OPTIMUM_DSA_KERNELS={forced}: none of that name runs on this processor. There are "
                f"{', '.join([*names, REFERENCE])}."
            )
        library.optimum_dsa_kernels_use((forced or names[0]).encode())
        return Kernels(forced or names[0], path, origin + (f", OPTIMUM_DSA_KERNELS={forced}" if forced else ""), names)
    reason = "; ".join(tried)
    if forced:
        raise ValueError(f"OPTIMUM_DSA_KERNELS={forced}, but there are no kernels: {reason}.")
    return Kernels(REFERENCE, None, reason)


def _libraries(compile: bool, tried: list[str]) -> Iterator[tuple[Path, str]]:
    """Libraries in the order in which they are tried, and where each is from; into `tried` what is not there."""
    if (spec := importlib.util.find_spec("optimum_dsa_kernels")) is not None:
        for place in spec.submodule_search_locations or ():
            for path in sorted(Path(place).glob("*.so")):
                yield path, "the distribution optimum-dsa-kernels"
    else:
        tried.append("optimum-dsa-kernels is not installed")
    if folder := os.environ.get("OPTIMUM_DSA_KERNELS_PATH"):
        for path in sorted(Path(folder).rglob("*optimum_dsa_kernels*.so")):
            yield path, f"OPTIMUM_DSA_KERNELS_PATH={folder}"
        tried.append(f"OPTIMUM_DSA_KERNELS_PATH={folder} holds none that can be loaded")
    if not compile:
        tried.append("OPTIMUM_DSA_JIT=1 is not set")
        return
    try:
        path = cached()
        if not path.is_file():
            logger.info("Compiling kernels into %s, about 20 seconds.", path)
            compile_library(path)
        yield path, "compiled on this machine"
    except (NoCompiler, OSError) as error:
        tried.append(str(error))


def _open(path: Path) -> ctypes.CDLL:
    """Loads a library, which registers its kernels.

    Raises:
        RuntimeError: it was built for other operators than these; none of it is used then.
    """
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.optimum_dsa_kernels_runnable.restype = ctypes.c_char_p
    if (contract := library.optimum_dsa_kernels_contract()) != CONTRACT:
        library.optimum_dsa_kernels_use(REFERENCE.encode())
        raise RuntimeError(f"built for contract {contract} of the operators, these are {CONTRACT}")
    return library
