"""The blocks that a prune has finished, kept in a folder, so that one that was interrupted goes on behind them.

| file                         | content                                                                            |
|------------------------------|------------------------------------------------------------------------------------|
| `run.json`                   | what decides the result (settings, fingerprints, releases), and the allocation     |
| `block-0003.safetensors`     | the fourth block: every parameter and buffer of it that a checkpoint has, and as   |
|                              | metadata its name, what its steps noted for the report, and a SHA-256 of all that  |
| `latency.json`               | of a cut with `cost="latency"`: what its structures cost, timed at its first start |

All of a block and not what changed alone: to know that would take a copy of every block before it is pruned. Of a
model whose weights are on the disk a finished block is there once: it is read from its file from then on, and the file
is a shard of the checkpoint in the end (`checkpoint.finished_shards`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..common.files import parse_json, read_json, write_text
from ..common.same_run import FINGERPRINTS, check_same_run
from ..common.settings import flattened
from ..common.shard_writer import write_tensors
from ..common.versions import versions
from ..model.fingerprint import fingerprint_of_model, fingerprint_of_tensors
from ..model.offload import read_from
from ..model.walked import WalkedBlock
from .allocation import Allocation
from .calibration import Calibration
from .configuration import FREE
from .source import Known
from .steps import Step


logger = logging.getLogger(__name__)

RUN = "run.json"
TIMES = "latency.json"
VERSION = 1  # of this format
RELEASES = ("optimum-dsa", "torch", "transformers")  # other ones may compute other last bits
_OURS = re.compile(r"block-\d{4,}\.safetensors(\.part)?")  # ".part": half of one


class FinishedBlocks:
    """The finished blocks of one prune, the first ones of a model in the order in which they are walked.

    Attributes:
        folder (`Path`): where they are.
        allocation (`Allocation`): of the prune; `None` until it is known.
        count (`int`): how many were there, whole, when it was opened.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], names: Sequence[str]):
        self.folder, self.settings, self.names = folder, settings, list(names)
        self.allocation: Allocation | None = None
        self.count = 0

    @classmethod
    def open(
        cls, folder: str | Path, resume: bool, settings: Mapping[str, Any], names: Sequence[str]
    ) -> FinishedBlocks:
        """Those in `folder`, which is made where it is missing.

        Args:
            settings: what decides the result, as `settings_of` gives it.
            names: of all blocks, in the order in which they are walked.

        Raises:
            FileExistsError: there are some and `resume` is false, or there is something that no prune wrote.
            ValueError: they are of a prune with other settings, or the folder does not say of which.
        """
        found = cls(Path(folder), json.loads(json.dumps(settings)), names)
        found.folder.mkdir(parents=True, exist_ok=True)
        check_folder(found.folder, resume)
        if (found.folder / RUN).exists():
            found._read_run()
            found.count = found._count_whole()
        elif resume:
            logger.warning("%s holds no interrupted prune to go on with; a new one begins.", folder)
        return found

    def begin(self, allocation: Allocation) -> None:
        """Write down what the prune is, before its first block."""
        self.allocation = allocation
        data = {"format_version": VERSION, "settings": self.settings, "allocation": allocation.to_dict()}
        with self._said("what is pruned"):
            write_text(self.folder / RUN, json.dumps(data) + "\n")

    def add(self, number: int, walked: WalkedBlock, notes: Sequence[Mapping[str, Any]]) -> None:
        """Keep block `number` as its steps left it; whole or not at all.

        Args:
            notes: what every step noted while it was at this block.
        """
        path = self.file(number)
        values = {name: value.detach().cpu().contiguous() for name, value in walked.state().items()}
        half = path.with_name(f"{path.name}.part")
        facts = {"block": walked.name, "notes": json.dumps(list(notes)), "sha256": fingerprint_of_tensors(values)}
        with self._said(path.name):
            try:
                # "pt": it may become a shard of the result as it is
                write_tensors(values, half, {"format": "pt", **facts})
                half.replace(path)
            except BaseException:
                half.unlink(missing_ok=True)
                raise
        read_there(path, walked, values)

    def restore(self, number: int, walked: WalkedBlock, steps: Sequence[Step]) -> None:
        """Make block `number` what it was left as, and have its steps say of it what they noted then."""
        with safe_open(self.file(number), "pt") as file:
            values = {name: file.get_tensor(name) for name in _names(file)}
            walked.become(values)
            for step, noted in zip(steps, json.loads(file.metadata()["notes"]), strict=True):
                step.notes.update(noted)
        read_there(self.file(number), walked, values)

    def file(self, number: int) -> Path:
        """Where block `number` is, or will be."""
        return self.folder / f"block-{number:04}.safetensors"

    def _read_run(self) -> None:
        path, way_out = self.folder / RUN, f"remove {self.folder} to begin anew"
        try:
            data = read_json(path)
            known, version = data["settings"], data["format_version"]
            if version != VERSION or not isinstance(known, dict):
                raise ValueError(f"version {version!r} of the format, and this optimum-dsa knows {VERSION}")
            allocation = Allocation.from_dict(data["allocation"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not say what was pruned ({error}); {way_out}.") from None
        check_same_run(f"The prune in {self.folder}", known, self.settings, way_out)
        self.allocation = allocation

    def _count_whole(self) -> int:
        """How many of the first blocks are whole; what is passed over is said."""
        for number, name in enumerate(self.names):
            path = self.file(number)
            if not path.exists():
                break
            if why := _damage(path, name):
                logger.warning("%s is not whole (%s); it is passed over, and pruned again.", path, why)
                break
        else:
            number = len(self.names)
        logger.info("%d of %d blocks are finished in %s.", number, len(self.names), self.folder)
        return number

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """Of an error in writing, say where and how to go on; what was written before stays."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{what} could not be written to {self.folder} ({error}). The blocks before it are whole there: make "
                "room, and go on with resume (--resume)."
            ) from error


def read_there(path: Path, walked: WalkedBlock, values: Mapping[str, Tensor]) -> None:
    """Have weights that are kept on the disk be read from `path`, which holds `values`: they are on it once then."""
    for name, value in values.items():
        if read_from(walked.model, name, path.absolute(), str(value.dtype).removeprefix("torch.")):
            walked.changes.discard(name)


def mark_of(path: Path) -> str | None:
    """What tells a finished block from any other file that may lie at `path`; `None` where there is none."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None


def check_folder(folder: Path, resume: bool) -> None:
    """Raise where `folder` is not one to keep finished blocks in.

    Raises:
        FileExistsError: blocks of another run, unless `resume`, or files that no prune wrote.
        ValueError: blocks, and nothing that says of which prune.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    halves = (f".{RUN}.", f".{TIMES}.")  # see `write_text`
    names = [name for name in names if not name.startswith(halves)]
    blocks = [name for name in names if _OURS.fullmatch(name)]
    for name in names:
        if name not in (RUN, TIMES, *blocks):
            raise FileExistsError(
                f"{folder} holds {name}, which no prune wrote; move it away, or name another folder."
            )
    if names and not resume:
        raise FileExistsError(
            f"{folder} holds {names[0]} of another run, which this one would replace; resume that run, or name "
            "another folder."
        )
    if blocks and RUN not in names:
        raise ValueError(f"{folder} holds {blocks[0]} and no {RUN} to say what was pruned; remove it to begin anew.")


def is_finished(file: Path) -> bool:
    """Whether a file is, by its name, a finished block."""
    return _OURS.fullmatch(file.name) is not None and file.suffix == ".safetensors"


def finished_in(folder: Path) -> int:
    """How many finished blocks lie in a folder, whole or not."""
    return len(list(folder.glob("block-*.safetensors")))


def settings_of(
    model: nn.Module, calibration: Known | None, config: Any, given: Allocation | None = None
) -> dict[str, Any]:
    """All that decides what a prune makes of its blocks, as JSON values; to be called before the model is changed.

    Args:
        config: a `DSAConfig` or `DSAStructuredConfig`.
        given: its allocation, where that is not computed.

    Raises:
        ValueError: statistics that are there already, of which nothing tells what they are of.
    """
    if not (calibration is None or isinstance(calibration, Calibration)):
        raise ValueError("A prune that can be resumed reads text or tokens, not statistics that are there already.")
    # What is free may have been what ended the run, for want of memory.
    settings = {name: value for name, value in flattened(type(config), config.to_dict()).items() if name not in FREE}
    prints = {
        "model": fingerprint_of_model(model),
        "calibration": None if calibration is None else fingerprint_of_tensors(calibration.inputs),
    }
    if given is not None:  # known by what it holds: under a path another one may lie by now
        del settings["allocation"]
        text = json.dumps(given.to_dict(), sort_keys=True)
        prints["allocation"] = hashlib.sha256(text.encode()).hexdigest()
    found = versions()
    return {
        **settings,
        "calibration": calibration.facts() if calibration else None,
        **{package: found[package] for package in RELEASES},
        FINGERPRINTS: prints,
    }


def _names(file: Any) -> list[str]:
    return list(file.keys())  # no mapping, whatever its methods: it cannot be iterated


def _damage(path: Path, block: str) -> str | None:
    """Why a file is not the whole of `block`; `None` where it is."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in _names(file)}
        if facts.get("block") != block:
            return f"it holds {facts.get('block')!r}, not {block!r}"
        parse_json(facts["notes"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        return str(error)
    return None if facts.get("sha256") == fingerprint_of_tensors(values) else "its SHA-256 is another"
