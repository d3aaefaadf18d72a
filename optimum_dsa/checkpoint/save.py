"""A pruned model on disk: its checkpoint, in the encoding asked for, and `dsa_config.json` beside it."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..common.fences import saved_by_shards, saved_without_adapters, tied_names
from ..common.hub_file import snapshot_of
from ..common.output import OutputFolder
from ..common.ranks import current_ranks
from ..common.schema import violations
from ..model.adapters import has_adapters, inner_model, saves_adapters, state_without_adapters
from ..model.offload import is_offloaded
from ..model.own_code import make_own_code_local
from ..model.parameters import weight_bytes
from ..pruning.report import PruningReport
from .adapter_base import check_base
from .base_files import BaseFiles
from .convert import PACKED, encode_in_place
from .description import describe, schema, write_description
from .encodings import BITMASK, BITMASK_WHOLE, encoding_named
from .finished_shards import add_ready_shards, ready_shards
from .load import find_description
from .packing import as_dense, is_packed
from .shard_size import check_shard_size
from .unknown_tensors import add_tensors


logger = logging.getLogger(__name__)


def asked_encoding(encoding: str | None, compressed: bool, report: PruningReport, model: nn.Module) -> str:
    """The row of `ENCODINGS` that was asked for, by its name or as `compressed`, or "packed".

    Raises:
        ValueError: by both, and not the same.
    """
    if compressed and encoding not in (None, "bitmask"):
        raise ValueError(f"compressed=True and encoding={encoding!r} do not fit; give one of them.")
    if encoding is not None:
        return encoding
    if compressed:
        # With whole numbers as values, it is they that make it small.
        return "bitmask_whole" if report.config.values.bits else "bitmask"
    return PACKED if is_packed(model) else "dense"


def writes_adapters(
    model: nn.Module, report: PruningReport, place: Path, stored: str | None, under_adapters: bool, encoding: str
) -> bool:
    """Whether saving `model` to `place` writes its adapters, and not the model under them; what stays behind is said.

    Args:
        stored (`str`, *optional*): where the weights under the adapters are.
        under_adapters (`bool`): whether it was pruned while it had them, and so is nowhere without them.

    Raises:
        ValueError: nothing holds what the adapters belong to, or they are to be encoded.
    """
    adapters = saves_adapters(model) and not (under_adapters and stored is None)
    if has_adapters(model) and not adapters:
        more = "; saved once more, to another folder, it is they that are written" * saves_adapters(model)
        logger.warning("%s gets the pruned model without its adapters, which are as they were%s.", place, more)
    if adapters:
        if encoding != "dense":
            raise ValueError("An adapter has no zeros to leave out; save it without compressed=True, or merge it.")
        check_base(model, stored, place, report, None if stored is None else find_description(stored))
    return adapters


def save_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    report: PruningReport,
    base: dict[str, str | None],
    directory: str | Path | OutputFolder,
    encoding: str = "dense",
    recovery: dict[str, Any] | None = None,
    beside: BaseFiles | None = None,
    adapters: bool = True,
    **save_kwargs,
) -> None:
    """Write model, tokenizer and `dsa_config.json` into `directory`; whole or not at all.

    Of a model with adapters these are written, or without `adapters` the model under them.

    In any `encoding` but "dense", a row of `ENCODINGS` or "packed", weights are encoded shard by shard after
    transformers has written them, so that names and ties are its own; on the way the disk holds the dense weights too.

    With `beside`, what belongs to the model and its class does not write goes along.

    An `OutputFolder` that was begun before the work saves the result elsewhere where the disk does not take it.

    Of what several processes pruned together the first writes, and the others come back at once.

    Raises:
        ValueError: an option cannot be, or what was done cannot be described.
        ForeignFileError: `directory` holds what was not written here.
        OutputError: it cannot be written.
    """
    if report.divided and not current_ranks().is_first:
        return
    if "max_shard_size" in save_kwargs:
        check_shard_size(save_kwargs["max_shard_size"])
    whole = report.config.values.bits is not None
    row = (BITMASK_WHOLE if whole else BITMASK) if encoding == PACKED else encoding_named(encoding)
    if not (row.is_plain or is_offloaded(model)):
        # Encoded shard after shard: one shard of everything would have to be on the disk twice.
        save_kwargs = {"max_shard_size": "5GB", **save_kwargs}
    description = describe(report, base, recovery)
    # Before the weights are written, which takes minutes and room.
    broken = next(violations(description, schema()), None)
    if broken:
        raise ValueError(f"What was done to the model cannot be described, so nothing was written: {broken}.")

    def fill(folder: Path) -> None:
        if has_adapters(model) and not adapters:
            inner = inner_model(model)
            with saved_without_adapters(inner):
                inner.save_pretrained(folder, state_dict=state_without_adapters(model), **save_kwargs)
        elif is_offloaded(model):
            _save_offloaded(model, folder, **save_kwargs)
        else:
            model.save_pretrained(folder, **save_kwargs)
        if has_adapters(model):
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; a push writes one that says something
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if not row.is_plain:
            encode_in_place(folder, row, encoding == PACKED)
        facts = {}
        if beside is not None:
            facts = {"base_files": beside.described(beside.copy_to(folder, tokenizer))}
            add_tensors(folder, beside.tensors)
        make_own_code_local(folder)
        write_description(folder, {**description, **facts})

    if isinstance(directory, OutputFolder):
        with as_dense(model):
            directory.write(fill)
    else:
        with as_dense(model), OutputFolder(directory) as output:
            output.require(weight_bytes(model) + (beside.bytes if beside is not None else 0))
            output.write(fill, rescue=False)  # the model is still there


def _save_offloaded(model: nn.Module, directory: Path, **save_kwargs) -> None:
    """Save a model whose weights transformers has to load, a shard at a time; finished blocks are shards already.

    It does so where there is an `hf_device_map`, which `accelerate.cpu_offload` does not leave; and it does not see
    that offloaded weights are tied.
    """
    tied = tied_names(model)
    ready = {} if "max_shard_size" in save_kwargs else ready_shards(model)
    written = {name for names in ready.values() for name in names}
    # A tied weight would be written once per name, and loaded as two.
    state = {name: value for name, value in model.state_dict().items() if name not in tied and name not in written}
    save_kwargs = {"state_dict": state, "max_shard_size": "200MB", **save_kwargs}
    with saved_by_shards(model), warnings.catch_warnings():
        # it warns that 50 GB of memory may be needed, which is its own shard size and not ours
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(directory, **save_kwargs)
    if ready:
        add_ready_shards(directory, model, ready)


def base_model(model: nn.Module, revision: str | None = None) -> dict[str, str | None]:
    """Name and revision of the checkpoint that a model came from; of a local path only the last part.

    A path into the Hub's cache names the model of the Hub.

    Args:
        revision (`str`, *optional*): the commit, where it is known; a loaded model does not keep it.
    """
    if getattr(model, "config", None) is None:
        raise ValueError(f"A pruner is for transformers models, and {type(model).__name__} is none: it has no config.")
    name = model.config.name_or_path or None
    if name and os.path.exists(name) and (cached := snapshot_of(name)):
        return {"name": cached[0], "revision": cached[1]}
    if name and (os.path.isabs(name) or os.path.exists(name)):
        # A path tells where somebody keeps files, and helps nobody else.
        name = Path(name).resolve().name
    return {"name": name, "revision": revision}
