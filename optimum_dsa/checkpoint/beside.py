"""What a model leaves behind when it is saved elsewhere, looked for before any work, and what of it goes along."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..common.escaping import one_line
from ..model.adapters import inner_model
from ..model.parameters import count_parameters
from ..packed.pack_model import seen_dense
from .base_files import BaseFiles, find_base_files
from .encodings import encoding_in
from .forms import unknown_in_gguf
from .load import find_description, stated_in, weight_files
from .pickles import pickled_files
from .unknown_tensors import packed_parts, part_of, sizes_by_part, unknown_tensors


logger = logging.getLogger(__name__)

_PLACES = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "gguf_file")


def find_beside(model: nn.Module, path: str, tensors: bool = True, **options) -> BaseFiles | None:
    """The files and tensors of the checkpoint at a path or Hub id that `model`, loaded from it, does not hold.

    What stays behind, and what goes along without being pruned, is said in a warning. `None` where there is no such
    checkpoint any more.

    Args:
        tensors (`bool`, defaults to `True`): look for tensors as well, which whoever saves the model can add.
        options (`dict`): of `from_pretrained`; those that say where the checkpoint is are used (`revision`, ...). With
            `alone`, files beside the weights belong to others.
    """
    alone = options.get("alone")
    options = {name: value for name, value in options.items() if name in _PLACES}
    if alone and not tensors:
        return None
    if alone:
        with seen_dense(model):
            kept, lost = _tensors(model, path, Path(path), options)
        return BaseFiles(Path(path), path, tensors=kept, lost=lost) if kept or lost else None
    try:
        described = None if options.get("gguf_file") else find_description(path, **options)
        found = find_base_files(path, described, **options)
    except (OSError, ValueError) as error:
        logger.warning("The files beside the weights of %s stay behind: %s", path, one_line(str(error)))
        return None
    if found is None:
        return None
    if said := found.said():
        logger.warning("Of %s, these files stay behind: %s.", path, one_line(said))
    if not tensors:
        return found
    with seen_dense(model):
        kept, lost = _tensors(model, path, found.folder, options)
    return replace(found, tensors=kept, lost=lost)


def _tensors(
    model: nn.Module, path: str, place: Path, options: Mapping[str, Any]
) -> tuple[dict[str, Path], dict[str, int]]:
    """What the model's class does not know: name -> file of what can go along, part -> weights of what cannot.

    Args:
        place: the folder of the checkpoint, in the Hub's cache for a model of the Hub.
    """
    folder = Path(path, options.get("subfolder") or "")
    try:
        if options.get("gguf_file"):
            return {}, _said(model, path, lost=unknown_in_gguf(inner_model(model), place / options["gguf_file"]))
        stated = stated_in(path, folder, options)
        names = (stated.get("architectures") if isinstance(stated, Mapping) else None) or []
        # Another class than the checkpoint's own, if that exists, was chosen by whoever loaded it, and with it what to
        # leave out.
        if type(inner_model(model)).__name__ not in names and any(hasattr(transformers, name) for name in names):
            return {}, {}
        quantised = encoding_in(stated) is None
        found = unknown_tensors(model, weight_files(path, folder, stated, options) or pickled_files(place), quantised)
        # A part goes along whole or not at all: half of a head is none.
        packed = packed_parts(found) if quantised else set()
        kept = {name: file for name, file in found.items() if part_of(name) not in packed}
        lost = sizes_by_part({name: file for name, file in found.items() if name not in kept})
    except (OSError, ValueError) as error:
        logger.warning("The tensors of %s are not compared with the model's: %s", path, one_line(str(error)))
        return {}, {}
    return kept, _said(model, path, kept, lost)


def _said(
    model: nn.Module, path: str, kept: Mapping[str, Path] | None = None, lost: Mapping[str, int] | None = None
) -> dict[str, int]:
    """`lost`, after a warning of what the model's class does not know, with its share of the checkpoint's weights."""
    own, name = count_parameters(inner_model(model)), type(inner_model(model)).__name__
    parts, lost = sizes_by_part(kept or {}), dict(lost or {})
    whole = own + sum(parts.values()) + sum(lost.values())
    ends = {
        "they are kept as they are, and none of them is pruned": parts,
        "they cannot go along with weights that were made dense, and are not in what is saved": lost,
    }
    for end, sizes in ends.items():
        if sizes:
            number = f"{len(kept or ()):,} tensors" if sizes is parts else f"{sum(sizes.values()):,} weights"
            shown = one_line(", ".join(list(sizes)[:5]) + (", ..." if len(sizes) > 5 else ""))
            share = sum(sizes.values()) / whole
            logger.warning(
                "%s has %s that %s does not know, %.2f%% of its weights (%s): %s.",
                *(path, number, name, 100 * share, shown, end),
            )
    return lost
