"""One input to a reader, and many."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from . import NAMED
from .targets import Target


WHERE = "/dev/shm" if os.path.isdir("/dev/shm") else None  # in memory: files are written and read by the thousand


def feed(target: Target, content: bytes) -> tuple[str, float]:
    """Whether a reader "read" or "refused" a content, and the processor's seconds; raises what has no name."""
    folder = Path(tempfile.mkdtemp(prefix="optimum-dsa-fuzz-", dir=WHERE))
    began, said = time.process_time(), "read"
    try:
        target.read(content, folder)
    except NAMED:
        said = "refused"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return said, time.process_time() - began


@dataclass
class Tally:
    """What came of many inputs.

    Attributes:
        said: "read", "refused" and "failed" -> how many.
        failures: error and place -> number of the first input that ended so.
        slowest: seconds, and number of that input.
        memory: KB that the process grew by.
    """

    said: Counter = field(default_factory=Counter)
    failures: dict[str, int] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, 0)
    memory: int = 0


def feed_many(target: Target, numbers: range) -> Tally:
    """All these inputs, whatever becomes of them."""
    tally = Tally()
    feed(target, target.seeds()[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        began = time.process_time()
        try:
            said, _ = feed(target, target.wrong(number))
        except Exception as error:
            said = "failed"
            tally.failures.setdefault(_place(error), number)
        tally.said[said] += 1
        tally.slowest = max(tally.slowest, (time.process_time() - began, number))
    tally.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return tally


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "optimum_dsa" in frame.filename] or frames
    return f"{type(error).__name__}: {str(error)[:100]} at {Path(own[-1].filename).name}:{own[-1].lineno}"
