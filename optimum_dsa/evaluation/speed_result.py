"""What a measurement of speed found: a table, and a JSON file beside the model, which a stranger may have made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..common.columns import columns
from ..common.files import read_json, write_text
from ..common.machine import shown_bytes
from ..common.manifest import record
from ..common.values import is_number, is_whole, short
from ..common.versions import versions


@dataclass(frozen=True)
class Speed:
    """What one model took. Rates are of the fastest of some rounds.

    Attributes:
        model (`str`): how it is called.
        prefill (`float`): tokens of a prompt read in a second.
        decode (`float`): tokens written in a second, one after the other.
        parameters (`int`): without what is tied counted twice, zeros included.
        weight_bytes (`int`): what parameters and buffers take in memory.
        flops (`int`): floating point operations for a token of the prompt, as PyTorch counts them: products of zeros
            are counted as well, but for those of packed matrices, which are not made.
        cache_bytes (`int`, *optional*): what the cache of keys and values takes for a token; `None` where it is not
            made of them.
        peak_bytes (`int`, *optional*): the most that it took on a GPU; `None` on a CPU, which does not tell.
        read_bytes (`int`, *optional*): what is read from memory for a token that is written: all matrices as they are
            held, shared by the sequences of a batch, and the cache at its mean length.
        packed_bytes (`int`, *optional*): of the weights, what packed matrices take; `None` where none is packed.
        resident_bytes (`int`, *optional*): memory that loading it and running it once added to the process, imports
            left out; `None` on a GPU, and of a model that was there already.
        file_bytes (`int`, *optional*): of the files of its weights; `None` where nobody has said.
        form (`str`): how its matrices were held, of several ways of one model: "dense", "packed"; "" where as stored.
    """

    model: str
    prefill: float
    decode: float
    parameters: int
    weight_bytes: int
    flops: int
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    read_bytes: int | None = None
    packed_bytes: int | None = None
    resident_bytes: int | None = None
    file_bytes: int | None = None
    form: str = ""

    @property
    def shown(self) -> str:
        """Its name, and in which form where that is said."""
        return f"{self.model} ({self.form})" if self.form else self.model

    @property
    def bandwidth(self) -> float | None:
        """Bytes in a second that it read while it wrote, as far as it reads every byte once for a token."""
        return None if self.read_bytes is None else self.read_bytes * self.decode


@dataclass(frozen=True)
class SpeedComparison:
    """Models measured in turn, in one process, so that whatever else the machine does slows all of them.

    Attributes:
        speeds (`Mapping[str, Speed]`): by name; others are held against the last.
        prompt, new_tokens, batch_size, rounds: how it was measured.
        threads (`int`): of PyTorch, on a CPU.
        device, dtype (`str`): of the first.
        bandwidth (`float`, *optional*): bytes in a second that the machine's memory gave, in the same rounds, to a
            plain read or copy. A model that fits into a cache can read faster.
        machine (`str`): its processor or GPU.
        date (`str`): of the measurement, as in "2026-01-31".
    """

    speeds: Mapping[str, Speed]
    prompt: int
    new_tokens: int
    batch_size: int
    rounds: int
    threads: int
    device: str
    dtype: str
    bandwidth: float | None = None
    machine: str = ""
    date: str = ""

    @property
    def how(self) -> str:
        """What was measured, in a line."""
        how = f"prompt {self.prompt}, {self.new_tokens} new tokens, batch {self.batch_size}, best of {self.rounds}"
        return f"{how}; {self.device}, {self.dtype}" + (f", {self.threads} threads" if self.device == "cpu" else "")

    @property
    def where(self) -> str:
        """On what it was measured and when, in a line; empty where nobody has said."""
        memory = f"memory reads {shown_bytes(self.bandwidth)}/s (measured)" if self.bandwidth else ""
        return ", ".join(filter(None, [self.machine, memory, self.date]))

    def share_of_bandwidth(self, name: str) -> float | None:
        """How much of the machine's bandwidth a model reached while it wrote."""
        reached = self.speeds[name].bandwidth
        return None if reached is None or not self.bandwidth else reached / self.bandwidth

    def __str__(self) -> str:
        lines = self.rows()
        header = ("", *(speed.shown for speed in self.speeds.values()))
        header += ("ratio",) if any(len(line) > len(header) for line in lines) else ()
        return "\n".join([*columns([header, *lines]), self.how, *filter(None, [self.where])])

    def rows(self) -> list[tuple[str, ...]]:
        """A line of what was measured and one value of every model; of two also the first one's share of the second.

        What is known of none is left out; of more than two models, rates are held against the last in lines below.
        """
        names, last = list(self.speeds), next(reversed(self.speeds.values()))
        measured = [(label, [value(self, name) for name in names], show) for label, value, show in _ROWS]
        lines = []
        for label, values, show in measured:
            if all(value is None for value in values):
                continue
            cells = ["–" if value is None else show(value) for value in values]
            if len(names) == 2:
                cells.append("" if None in values or not values[1] else f"{values[0] / values[1]:.2f}")
            lines.append((label, *cells))
        if len(names) > 2:
            for label in ("prefill", "decode"):
                rates = [getattr(speed, label) / getattr(last, label) for speed in self.speeds.values()]
                lines.append((f"{label}, times the last", *(f"{rate:.2f}" for rate in rates)))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON values, and the versions of what measured."""
        return {**asdict(self), "versions": versions()}

    @classmethod
    def from_dict(cls, data: Any) -> SpeedComparison:
        """What `to_dict` gave.

        Raises:
            ValueError: it is something else, or holds values that a measurement cannot have.
        """
        rows = data.get("speeds") if isinstance(data, Mapping) else None
        if not isinstance(rows, Mapping) or not rows:
            raise ValueError("Expected speeds: {'speeds': {...}} as optimum-cli dsa bench writes them.")
        speeds = {str(name): Speed(**_checked(Speed, row)) for name, row in rows.items()}
        return cls(speeds, **_checked(cls, {name: value for name, value in data.items() if name != "speeds"}))


def _checked(cls: type, data: Any) -> dict[str, Any]:
    """Those values of an object that are fields of `cls`, each of the type that the field has."""
    if not isinstance(data, Mapping):
        raise ValueError(f"Expected an object, got {short(data)}.")
    found = {}
    for field in fields(cls):
        if field.name == "speeds" or (field.name not in data and isinstance(field.default, (str, type(None)))):
            continue
        value, kind = data.get(field.name), str(field.type)
        if not (value is None and "None" in kind):
            # A rate divides another.
            real = is_number(value) and value > 0
            holds = isinstance(value, str) if "str" in kind else is_whole(value) if "int" in kind else real
            if not holds:
                raise ValueError(f"{field.name} is {kind.split(' ')[0]}, got {short(value)}.")
        found[field.name] = value
    return found


def save_speed(path: str | Path, found: SpeedComparison) -> None:
    """Write what was measured to a file that holds nothing else; in a model's folder, report and card show it."""
    check_speed_file(path)
    write_text(Path(path), json.dumps(found.to_dict()) + "\n")
    record(Path(path))


def read_speed(path: str | Path) -> SpeedComparison:
    """What `save_speed` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return SpeedComparison.from_dict(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} holds no speeds: {error}") from None


def check_speed_file(path: str | Path) -> None:
    """Raise `OSError` where speeds cannot be written to `path`, or would replace something else."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            read_speed(path)
        except ValueError:
            raise FileExistsError(f"{path} exists and holds no speeds of optimum-dsa; choose another file.") from None


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else _whole(value)


def _of(name: str) -> Callable[[SpeedComparison, str], Any]:
    return lambda found, model: getattr(found.speeds[model], name)


_ROWS: tuple[tuple[str, Callable[[SpeedComparison, str], Any], Callable[[Any], str]], ...] = (
    ("prefill, tokens/s", _of("prefill"), _rate),
    ("decode, tokens/s", _of("decode"), _rate),
    ("parameters", _of("parameters"), _whole),
    ("weights", _of("weight_bytes"), shown_bytes),
    ("of them packed", _of("packed_bytes"), shown_bytes),
    ("weight files", _of("file_bytes"), shown_bytes),
    ("resident memory", _of("resident_bytes"), shown_bytes),
    ("peak memory", _of("peak_bytes"), shown_bytes),
    ("cache, bytes a token", _of("cache_bytes"), _whole),
    ("read for a token", _of("read_bytes"), shown_bytes),
    ("of the memory's bandwidth", SpeedComparison.share_of_bandwidth, "{:.0%}".format),
    ("FLOPs a token", _of("flops"), _whole),
)
