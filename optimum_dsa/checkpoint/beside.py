"""What a model leaves behind when it is saved elsewhere, looked for before any work, and what of it goes along."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..common.escaping import one_line
from ..model.adapters import inner_model
from ..model.parameters import count_parameters
from .base_files import BaseFiles, find_base_files
from .encodings import encoding_in
from .load import find_description, stated_in, weight_files
from .unknown_tensors import sizes_by_part, unknown_tensors


logger = logging.getLogger(__name__)

_PLACES = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "gguf_file")


def find_beside(model: nn.Module, path: str, tensors: bool = True, **options) -> BaseFiles | None:
    """The files and tensors of the checkpoint at a path or Hub id that `model`, loaded from it, does not hold.

    What stays behind, and what goes along without being pruned, is said in a warning. `None` where there is no such
    checkpoint any more.

    Args:
        tensors (`bool`, defaults to `True`): look for tensors as well, which whoever saves the model can add.
        options (`dict`): of `from_pretrained`; those that say where the checkpoint is are used (`revision`, ...).
    """
    options = {name: value for name, value in options.items() if name in _PLACES}
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
    if options.get("gguf_file") or not tensors:
        return found
    return replace(found, tensors=_tensors(model, path, options))


def _tensors(model: nn.Module, path: str, options: Mapping[str, Any]) -> dict[str, Path]:
    folder = Path(path, options.get("subfolder") or "")
    try:
        stated = stated_in(path, folder, options)
        names = stated.get("architectures") if isinstance(stated, Mapping) else None
        # Another class than the checkpoint's own was chosen by whoever loaded it, and with it what to leave out. What
        # a quantiser wrote cannot be read without it.
        chosen = bool(names) and type(inner_model(model)).__name__ not in names
        if chosen or encoding_in(stated) is None:
            return {}
        found = unknown_tensors(model, weight_files(path, folder, stated, options))
    except (OSError, ValueError) as error:
        logger.info("The tensors of %s are not compared with the model's: %s", path, one_line(str(error)))
        return {}
    if found:
        sizes = sizes_by_part(found)
        share = sum(sizes.values()) / (sum(sizes.values()) + count_parameters(inner_model(model)))
        logger.warning(
            "%s has %s tensors that %s does not know, with %.2f%% of its weights (%s): they are kept as they are, and "
            "none of them is pruned.",
            path,
            f"{len(found):,}",
            type(inner_model(model)).__name__,
            100 * share,
            one_line(", ".join(list(sizes)[:5]) + (", ..." if len(sizes) > 5 else "")),
        )
    return found
