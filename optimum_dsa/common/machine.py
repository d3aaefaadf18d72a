"""How much memory and disk there is, and how much of it this process has."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


_GROUP = Path("/sys/fs/cgroup")  # where Linux says what the processes of a container may have, and have
TYPICAL = 400 * 2**20  # of a process that has imported everything, where the system does not say


def own_memory() -> int:
    """Bytes of memory that this process has now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # not Linux
        return TYPICAL


def settled_memory() -> int | None:
    """Bytes of memory that are this process's own, once nothing unused is left; `None` where the system does not say.

    Files that are read where they lie are not among them, see [`lies_in_file`].
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # of glibc; elsewhere what is free may be kept for later
        ctypes.CDLL(None).malloc_trim(0)
    try:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * next(int(words[1]) for words in lines if words[:1] == ["RssAnon:"])
    except (OSError, StopIteration):  # not Linux
        return None


def lying_in_files(tensors: Iterable[Tensor]) -> int:
    """Bytes of those tensors on the CPU that are read where they lie in a file, as weights of safetensors may be."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:  # not Linux
        return 0
    # begin-end, rights, offset, device, inode: 0 where there is no file
    mapped = sorted(tuple(int(part, 16) for part in line[0].split("-")) for line in lines if line[4] != "0")
    starts = [begin for begin, _ in mapped]

    def lies(tensor: Tensor) -> bool:
        place = bisect_right(starts, tensor.data_ptr()) - 1
        return place >= 0 and tensor.data_ptr() < mapped[place][1]

    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu" and tensor.nbytes and lies(tensor))


def machine_name(device: str | torch.device = "cpu") -> str:
    """What products on a device are made by: "AMD EPYC 9R14, 2 cores", "NVIDIA H100"; nothing of whose it is."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        name = next(value.strip() for key, _, value in lines if key.strip() == "model name")
    except (OSError, StopIteration):  # not Linux, or of a kind of processor that does not tell
        name = platform.processor() or platform.machine()
    cores = os.cpu_count() or 1
    return f"{name}, {cores} core{'s' if cores > 1 else ''}"


def memory_available(device: str = "cpu") -> int:
    """Bytes that are free on a device, "cpu", "cuda", "cuda:1", ...; in a container no more than it may take."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * next(int(words[1]) for words in lines if words[0] == "MemAvailable:")
    except (OSError, ValueError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min(available, _left_in_container()), 0)


def _left_in_container() -> float:
    """Bytes that the processes of this container may still take; infinity where nobody has said how much."""
    try:
        # A limit that is none is written as "max".
        limit, current = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return limit - current + int(stat.get("inactive_file", 0))  # what was read from files makes room
    except (OSError, ValueError):
        return float("inf")


def disk_available(path: str | Path) -> int:
    """Bytes that are free where `path` is, or will be."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def shown_bytes(number: float) -> str:
    """Bytes as people read them: "1.5 GB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if number >= 99.5 or unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def bytes_in(text: str) -> int:
    """Bytes that a text such as "80GB" names, in powers of 1000 as [`shown_bytes`] has them.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"A size is a number with KB, MB, GB or TB behind it, such as 80GB; got {text!r}.")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def shown_seconds(seconds: float) -> str:
    """A time as people read it: "40 s", "12 min", "3.5 h"."""
    if seconds < 1:
        return "a second"
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        number = seconds / size
        if number < most:
            return f"{number:.2g} {unit}" if number < 9.95 else f"{number:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
