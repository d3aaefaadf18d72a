"""Finished blocks of a prune as shards of its checkpoint: what is on the disk already is not written once more."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from torch import Tensor, nn

from ..common.fences import keeps_names_when_saved, tied_names
from ..common.files import write_text
from ..model.offload import lies_in
from ..model.parameters import count_parameters
from ..pruning.finished import is_finished
from .encodings import DENSE
from .shards import find_shards, index_name, open_shard


def ready_shards(model: nn.Module) -> dict[Path, tuple[str, ...]]:
    """Finished blocks that an offloaded model is read from and that are shards of its checkpoint as they are.

    Returns:
        File -> the names of its tensors, all of which the model has from there, and which its checkpoint calls so, in
        the order of the model. None where transformers would write them otherwise.
    """
    found: dict[Path, list[str]] = {}
    state, tied = model.state_dict(), tied_names(model)
    for name in state:
        lying = None if name in tied else lies_in(model, name)
        if lying is not None and lying[1] == name and is_finished(lying[0]):
            found.setdefault(lying[0], []).append(name)
    whole = {file: tuple(names) for file, names in found.items() if set(names) == _names_in(file)}
    tensors: dict[str, Tensor] = {name: state[name] for names in whole.values() for name in names}
    return whole if whole and keeps_names_when_saved(model, tensors) else {}


def add_ready_shards(folder: Path, model: nn.Module, ready: dict[Path, tuple[str, ...]]) -> None:
    """Make `ready` shards of the checkpoint in `folder`, behind those that hold the rest of `model`."""
    there = find_shards(folder)
    total = len(there.files) + len(ready)
    weight_map: dict[str, str] = {}
    size = 0

    def named() -> str:
        return f"{DENSE.stem}-{len(set(weight_map.values())) + 1:05d}-of-{total:05d}.safetensors"

    for old in there.files:
        names, new = _names_in(folder / old), named()
        weight_map |= dict.fromkeys(sorted(names), new)
        size += _tensor_bytes(folder / old)
        os.replace(folder / old, folder / new)
    for file, names in ready.items():
        new = named()
        weight_map |= dict.fromkeys(names, new)
        size += _tensor_bytes(file)
        _link(file, folder / new)
    facts = {"total_parameters": count_parameters(model), "total_size": size}
    index = {"metadata": facts, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / index_name(DENSE.stem), json.dumps(index, indent=2) + "\n")


def _link(file: Path, target: Path) -> None:
    """A second name for a file, which takes no room; a copy where the file system has no such thing, or ends."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _names_in(file: Path) -> set[str]:
    with open_shard(file) as opened:
        return set(opened.keys())


def _tensor_bytes(file: Path) -> int:
    """Bytes of all tensors in a file, its header not."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
