"""Which way to compute a product is the fastest on a card: measured once for each kind of product, kept in a file."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import timeit
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor


logger = logging.getLogger(__name__)
TOLERANCE = 1e-2  # of a product, relative to that of PyTorch: bfloat16 rounds by 4e-3


class Table:
    """Milliseconds of each way, by kind of product.

    Args:
        file: JSON file of what was measured on this card; `None`: nothing is measured.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.rows: dict[str, dict[str, float]] = {} if file is None else read(file)

    def fastest(self, kind: str, known: Collection[str]) -> str | None:
        """The fastest of the `known` kernels; `None` where unpacking is faster."""
        found = {name: time for name, time in self.rows[kind].items() if name in (*known, "unpacked")}
        best = min(found, key=found.get, default="unpacked")
        return None if best == "unpacked" else best

    def measure(
        self,
        kind: str,
        kernels: Mapping[str, Callable[[], None]],
        output: Tensor,
        expected: Tensor,
        others: Mapping[str, Callable[[], Tensor]],
    ) -> dict[str, float]:
        """Milliseconds of every way, into the table; a kernel that fails, or is not right, is left out with a warning.

        Args:
            kernels: what puts the product into `output`, (batch, rows), by name.
            expected: the product in PyTorch.
            others: `unpacked`, and `dense` where it is of interest.
        """
        timed, expected = {}, expected.float()
        for name, run in kernels.items():
            output.fill_(torch.nan)
            try:
                run()
                apart = float((output.float() - expected).norm() / expected.norm().clamp_min(1e-20))
            except RuntimeError as error:
                logger.warning("%s: %s", name, error)
                continue
            if not apart <= TOLERANCE:  # of NaN too
                logger.warning("%s is left out for %s: its product is %.1e away from PyTorch's.", name, kind, apart)
                continue
            timed[name] = milliseconds(run, output.device)
        for name, run in others.items():
            timed[name] = milliseconds(run, output.device, 3 if name == "unpacked" else 10)
        self.rows[kind] = {name: round(time, 6) for name, time in timed.items()}
        self.save()
        return self.rows[kind]

    def save(self) -> None:
        """The table into its file, beside what another process has written since; a warning where that cannot be."""
        if self.file is None:
            return
        self.rows = read(self.file) | self.rows
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False) as file:
                json.dump(self.rows, file, indent=1)
            os.replace(file.name, self.file)
        except OSError as error:
            logger.warning("What was measured on this card is for this process alone: %s", error)


def read(file: Path) -> dict[str, dict[str, float]]:
    """What a table's file holds; nothing, with a warning, of one that is damaged."""
    try:
        found = json.loads(file.read_text())
        if isinstance(found, dict) and all(map(_is_row, found.values())):
            return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    logger.warning("%s holds no table of what was measured on a card; it is measured again.", file)
    return {}


def _is_row(row: object) -> bool:
    """Whether it has times by way."""
    return isinstance(row, dict) and all(isinstance(time, (int, float)) for time in row.values())


def shown(folder: Path) -> str:
    """What the tables in a folder hold, in words, a card after another; "" where there is none."""
    tables = {file: read(file) for file in sorted(folder.glob("table-*.json"))}
    return ", ".join(f"{len(rows)} kind{'s'[: len(rows) != 1]} of product in {file}" for file, rows in tables.items())


def milliseconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Of `work`, the median: on a GPU with its second cache full of something else before each."""
    if device.type != "cuda":
        return 1e3 * median(timeit.repeat(work, number=1, repeat=times))
    other = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    work()
    for start, end in events:
        other.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in events)
