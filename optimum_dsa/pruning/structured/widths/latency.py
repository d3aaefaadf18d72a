"""What structures cost in time: this machine's, for the products that they are part of, looked at once by width."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from ....common.files import read_json, write_text
from ....model.architecture import Architecture
from ...finished import TIMES
from ..structure import Structures
from .costs import Cost, shares_met


WHAT = "nanoseconds for a window"
SHARES_KEPT = (1.0, 0.75, 0.5, 0.25)  # of a unit's structures, at which its products are timed
# along the axis of structures, along the other, of one structure; whether they are rows that make something
_Size = tuple[int, int, int, bool]
ROUNDS = 7  # of which the fastest counts: whatever else the machine does makes others slower


def latency(model: nn.Module, architecture: Architecture, units: Mapping[str, Structures], length: int) -> Cost:
    """Nanoseconds of this machine for a window of `length` tokens: of products with matrices, and of attention.

    A unit's products are timed at some widths, and a line through these says what one structure costs. Where a width
    is slower than a wider one (hardware likes round numbers), the line passes between; `round_to` leaves such out.

    Of the total, norms and activations are no part: they hardly depend on what goes.
    """
    stop = _Stopwatch(model, max(length, 1))
    each, total, seen = {}, 0.0, set()
    for unit, structures in units.items():
        per, whole = stop.unit(_sizes(model, structures), len(structures), structures.heads, _width(structures))
        each[unit] = max(round(1e9 * per), 0)
        total += whole
        seen |= {cut.tensor for cut in structures.cuts}
    met = shares_met(model, architecture)
    for weight in architecture.weights:
        if f"{weight.module}.{weight.attribute}" not in seen:
            total += stop.product(*weight.shape) * met.get((weight.module, weight.attribute), 1.0)
    return Cost(each, round(1e9 * total), WHAT)


def keep(folder: str | Path, cost: Cost, units: Mapping[str, Structures]) -> None:
    """Write what was timed into `folder`, from where a run that goes on takes it: timed anew it would be another."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    each = {unit: [len(structures), cost.each[unit]] for unit, structures in units.items()}
    write_text(folder / TIMES, json.dumps({"units": each, "total": cost.total}) + "\n")


def kept(folder: str | Path, units: Mapping[str, Structures]) -> Cost | None:
    """What `keep` wrote into `folder`; `None` where it wrote nothing.

    Raises:
        ValueError: it is damaged, or of other structures than `units`.
    """
    path = Path(folder) / TIMES
    if not path.exists():
        return None
    try:
        data = read_json(path)
        numbers = {unit: int(number) for unit, (number, _) in data["units"].items()}
        each = {unit: int(spent) for unit, (_, spent) in data["units"].items()}
        total = int(data["total"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} says no times ({error}); begin anew in another folder.") from None
    now = {unit: len(structures) for unit, structures in units.items()}
    if differing := sorted(unit for unit in {*numbers, *now} if numbers.get(unit) != now.get(unit)):
        unit = differing[0]
        raise ValueError(
            f"{path} has the times of {numbers.get(unit, 0)} structures of {unit}, and the model has "
            f"{now.get(unit, 0)} that may go; resume with the same model and settings, or name another folder."
        )
    return Cost(each, total, WHAT)


def fingerprint_of_times(cost: Cost) -> str:
    return hashlib.sha256(json.dumps([dict(cost.each), cost.total], sort_keys=True).encode()).hexdigest()


def _width(structures: Structures) -> int:
    return structures.reads[0].index.shape[1]


def _sizes(model: nn.Module, structures: Structures) -> tuple[_Size, ...]:
    """Of every matrix that structures own a part of: its size along their axis and the other, and what one owns."""
    found = []
    for cuts, makes in ((structures.makes, True), (structures.reads, False)):
        for cut in cuts:
            shape = model.get_parameter(cut.tensor).shape
            if len(shape) == 2:
                found.append((shape[cut.axis], shape[1 - cut.axis], cut.index.shape[1], makes))
    return tuple(found)


class _Stopwatch:
    """Times products on the model's device, in its dtype; each once."""

    def __init__(self, model: nn.Module, length: int):
        parameter = next(model.parameters())
        self.options = {"device": parameter.device, "dtype": parameter.dtype}
        self.length = length
        self.product, self.attention = cache(self._product), cache(self._attention)

    def unit(self, sizes: tuple[_Size, ...], number: int, heads: tuple[int, int], width: int) -> tuple[float, float]:
        """Seconds that one of `number` structures takes, and that all take."""
        kept = sorted({max(round(share * number), 1) for share in SHARES_KEPT})
        seconds = []
        for stays in kept:
            gone = number - stays
            spent = 0.0
            for along, other, part, makes in sizes:
                left = along - gone * part
                spent += self.product(left, other) if makes else self.product(other, left)
            if heads[0]:
                spent += self.attention(stays * heads[0], width // heads[0])
            seconds.append(spent)
        x, y = torch.tensor(kept, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
        x = x - x.mean()
        slope = float((x * (y - y.mean())).sum() / x.square().sum()) if len(kept) > 1 else seconds[0]
        return slope, seconds[-1]

    def _product(self, rows: int, columns: int) -> float:
        """Seconds of a window's inputs, (length, columns), with a matrix, (rows, columns)."""
        inputs, matrix = (torch.ones(size, columns, **self.options) for size in (self.length, rows))
        return self._seconds(lambda: linear(inputs, matrix))

    def _attention(self, heads: int, size: int) -> float:
        """Seconds of so many heads, each with keys and values of its own, on a window."""
        states = torch.ones(1, heads, self.length, size, **self.options)
        return self._seconds(lambda: scaled_dot_product_attention(states, states, states, is_causal=True))

    @torch.no_grad()
    def _seconds(self, run: Callable[[], Tensor]) -> float:
        run()
        best = float("inf")
        for _ in range(ROUNDS):
            start = self._now()
            run()
            best = min(best, self._now() - start)
        return best

    def _now(self) -> float:
        if self.options["device"].type == "cuda":
            torch.cuda.synchronize(self.options["device"])
        return time.perf_counter()
