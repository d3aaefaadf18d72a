"""`Plan`: what pruning a model will need, before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...common.machine import shown_bytes, shown_seconds
from ...data import SAMPLES
from ..configuration import DSAConfig
from .memory import Text, on_disk, phases
from .remedies import Asked, Remedy, first_remedy
from .shape import ModelShape
from .tried import Tries, tries_of


# What libraries bring in when they are first used: code of products, factors and files, as it was measured.
USED = 50 * 2**20


# What `prune --resume` goes on from, until the end; without room for it, `prune` keeps none and goes on.
CHECKPOINTS = "finished blocks"


@dataclass(frozen=True)
class Plan:
    """What pruning one model needs, of each process and device.

    Attributes:
        method (`str`): of the config, in a line.
        text (`Text`): how much calibration text: `samples`, `length`, `batch`.
        device (`str`): where the work is done, and whose memory this is about.
        phases (`Mapping[str, Mapping[str, int]]`): phase of the work -> part of the memory -> bytes.
        disk (`Mapping[str, int]`): what is written -> bytes.
        seconds (`float`): how long it will take: an estimate.
        timed (`bool`): whether that is from a block that was run; else from arithmetic.
        available (`int`): bytes of memory that are there for it; `None` where nobody has looked.
        disk_available (`int`): bytes that are free where the result goes.
        remedy (`Remedy`): what to change where it does not fit: `options`, `total`, `fits`.
        tries (`Tries`): allocations that are tried before, as `"auto"` asks for: `number`, `windows`, `length`.
        ranks (`int`): processes that the calibration text is divided over; memory is each one's, `text` is all of it.
        devices (`int`): that each of them spreads the model over; memory is each one's.
    """

    method: str
    text: Text
    device: str
    phases: Mapping[str, Mapping[str, int]]
    disk: Mapping[str, int]
    seconds: float | None = None
    timed: bool = False
    available: int | None = None
    disk_available: int | None = None
    remedy: Remedy | None = None
    tries: Tries | None = None
    ranks: int = 1
    devices: int = 1

    @property
    def peak(self) -> str:
        """The phase in which most is held at once."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> Mapping[str, int]:
        """Part -> bytes at the peak."""
        return self.phases[self.peak]

    @property
    def total(self) -> int:
        """Bytes of memory at the peak: the sum of its parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice, as far as anybody has looked."""
        needed = sum(size for part, size in self.disk.items() if part != CHECKPOINTS)
        return self.memory_fits and (self.disk_available is None or needed <= self.disk_available)

    @property
    def memory_fits(self) -> bool:
        return self.available is None or self.total <= self.available

    @property
    def line(self) -> str:
        """The plan in a line."""
        of = "" if self.available is None else f" of {shown_bytes(self.available)}"
        of += f" on each of {self._places}" if self._places else ""
        tried = "" if self.tries is None else f"; {self.tries}"
        took = "" if self.seconds is None else f"about {shown_seconds(self.seconds)} (an estimate{tried}), "
        line = f"{took}memory {shown_bytes(self.total)}{of}, disk {shown_bytes(sum(self.disk.values()))}"
        return line if self.fits else f"{line}. {self.way_out}"

    @property
    def _places(self) -> str:
        """What the memory is of, where it is not of one process on one device."""
        ranks = f"{self.ranks} ranks" if self.ranks > 1 else ""
        devices = f"{self.devices} devices" if self.devices > 1 else ""
        return " with ".join(filter(None, (ranks, devices)))

    @property
    def way_out(self) -> str:
        """What to change where it does not fit, in a sentence."""
        if self.fits:
            return "It fits."
        if self.memory_fits:
            return f"The disk has {shown_bytes(self.disk_available)}; choose another folder, or make room."
        if self.remedy is None or not self.remedy.options:
            return "It does not fit, and nothing that is known makes it smaller."
        options, size = " ".join(self.remedy.options), shown_bytes(self.remedy.total)
        if self.remedy.fits:
            return f"It does not fit; with {options} it takes {size}, which does."
        return f"It does not fit; with {options} it takes {size}, which is still too much."

    def __str__(self) -> str:
        lines = [f"{self.method}; {self.text.samples} x {self.text.length} tokens, on {self.device}"]
        lines += [""] if self.tries is None else [f"{self.tries}, which are not among those", ""]
        of_each = f" of each of {self._places}" if self._places else ""
        lines.append(f"memory{of_each} at the peak, which is {self.peak}:")
        lines += [f"  {part:<20}{shown_bytes(size):>10}" for part, size in self.parts.items()]
        of = "" if self.available is None else f"   of {shown_bytes(self.available)} that are there"
        lines += [f"  {'in all':<20}{shown_bytes(self.total):>10}{of}", "", "disk:"]
        lines += [f"  {part:<20}{shown_bytes(size):>10}" for part, size in self.disk.items()]
        if self.seconds is not None:
            how = "a block was run on one or two windows" if self.timed else "by arithmetic, no block was run"
            lines += ["", f"time: about {shown_seconds(self.seconds)}, an estimate ({how})"]
        return "\n".join([*lines, "", self.way_out])

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "method": self.method,
            "samples": self.text.samples,
            "length": self.text.length,
            "device": self.device,
            "peak": self.peak,
            "memory": {"parts": dict(self.parts), "total": self.total, "available": self.available},
            "phases": {name: dict(parts) for name, parts in self.phases.items()},
            "disk": {"parts": dict(self.disk), "total": sum(self.disk.values()), "available": self.disk_available},
            "seconds": self.seconds,
            "timed": self.timed,
            "tries": None if self.tries is None else asdict(self.tries),
            "fits": self.fits,
            "remedy": None
            if self.remedy is None
            else {"options": list(self.remedy.options), "total": self.remedy.total, "fits": self.remedy.fits},
            "ranks": self.ranks,
            "devices": self.devices,
        }


def plan_for(
    shape: ModelShape,
    config: DSAConfig,
    *,
    device: str = "cpu",
    offloaded: bool = False,
    libraries: int = 0,
    available: int | None = None,
    disk_available: int | None = None,
    seconds: float | None = None,
    timed: bool = False,
    ranks: int = 1,
    devices: int = 1,
) -> Plan:
    """The plan for a model of these sizes: arithmetic alone.

    Args:
        offloaded: whether weights are kept on the disk.
        libraries: bytes that the process has before a model is loaded; on a GPU none.
        available: bytes of memory that such a process may have on `device`.
        ranks: processes that the calibration text is divided over.
        devices: that each of them spreads the model over.
    """
    asked = Asked(shape, config, text_of(shape, config), offloaded)

    def needed(asked: Asked) -> dict[str, dict[str, int]]:
        own = {"libraries": libraries + USED} if libraries else {}
        found = phases(asked.shape, asked.config, asked.text.divided(ranks), asked.offloaded, devices)
        return {name: own | parts for name, parts in found.items()}

    blocks = sum(block.parameters for block in shape.blocks) * shape.itemsize
    disk = {"result": shape.parameters * shape.itemsize}
    if not offloaded:  # otherwise they are the result's shards
        disk[CHECKPOINTS] = blocks
    if spilled := on_disk(shape, config, asked.text):
        disk["activations"] = spilled
    found = Plan(
        method_line(config),
        asked.text,
        device,
        needed(asked),
        disk,
        seconds,
        timed,
        available,
        disk_available,
        tries=tries_of(config, asked.text.samples, asked.text.length),
        ranks=ranks,
        devices=devices,
    )
    if found.memory_fits:
        return found

    def total(asked: Asked) -> int:
        return max(sum(parts.values()) for parts in needed(asked).values())

    return replace(found, remedy=first_remedy(asked, available, total))


def text_of(shape: ModelShape, config: DSAConfig) -> Text:
    """How much calibration text `config` asks for, of a model of this shape."""
    data = config.data
    return Text(data.num_samples or SAMPLES, data.sequence_length or shape.length, config.batch_size)


def method_line(config: DSAConfig) -> str:
    """How a config prunes, in a line: method, what differs from its row, allocation."""
    update = config.update
    said = [config.method]
    said += [f"{name} {value}" for name in ("metric", "pattern", "permute") if (value := getattr(config, name))]
    said += [f"update {update.name}"] if update.name else []
    said += [f"values {config.values.name}"] if config.values.name else []
    said += ["dense targets"] if update.targets == "dense" else []
    said += ["true sequential"] if update.true_sequential else []
    said += ["residual"] if update.residual else []
    said += [f"{config.reconstruct.steps} steps of training a block"] if config.reconstruct.steps else []
    said += [f"{config.reconstruct.distill} of the whole model"] if config.reconstruct.distill else []
    allocation = config.allocation if isinstance(config.allocation, str) else config.allocation.name
    return f"{', '.join(said)}; allocation {allocation}"
