"""A checkpoint as it is opened: the model, its tokenizer, and what is known of its pruning."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..pruning.report import PruningReport
from .description import Description, is_unchanged, report_from
from .load import find_commit, find_description, load_model, load_tokenizer, weights_of
from .save import base_model


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """What `open_checkpoint` found.

    Attributes:
        model (`nn.Module`): as its checkpoint has it, dense or compressed there.
        tokenizer (`Any`): `None` where none was given or found.
        base (`dict[str, str | None]`): name and revision of the dense model that it comes from, or is.
        description (`Description`): its `dsa_config.json`; `None` of a model that was not pruned.
        report (`PruningReport`): what that says; `None` likewise.
        stored (`str`): where its weights are; `None` where that alone does not name them.
        options (`dict`): that said where it is (`revision`, ...).
    """

    model: nn.Module
    tokenizer: Any
    base: dict[str, str | None]
    description: Description | None = None
    report: PruningReport | None = None
    stored: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def open_checkpoint(source: str | Path | nn.Module, tokenizer: Any = None, **options) -> Opened:
    """The model at a path or Hub id, or a model that is loaded already.

    Args:
        tokenizer (`Any`, *optional*): a tokenizer or where to load one from; by default the checkpoint's own, if
            it has one.
        options (`dict`): go to the model's `from_pretrained` (`dtype`, `device_map`, `revision`, ...).

    Raises:
        ValueError: options for a loaded model, or a checkpoint that is none; a `dsa_config.json` that is broken.
        OSError: there is no such checkpoint.
    """
    if isinstance(source, nn.Module):
        if options:
            raise ValueError(f"A loaded model takes no loading options, got {', '.join(options)}.")
        return Opened(source, load_tokenizer(tokenizer, required=True), base_model(source))
    path = str(source)
    if Path(path).is_file():
        raise ValueError(f"{path} is a file; a model is a folder or a Hub id.")
    if tokenizer is not None:  # before the model: of another place, and so of none of the model's revisions
        theirs = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
        tokenizer = load_tokenizer(tokenizer, required=True, **theirs)
    # Before the model, which takes longer: a broken description is known at once.
    found = find_description(path, **options)
    report = None if found is None else report_from(found)
    if found is not None and not is_unchanged(found):
        logger.warning("The dsa_config.json of %s was changed after it was written.", path)
    model = load_model(path, **options)
    tokenizer = load_tokenizer(path if tokenizer is None else tokenizer, **options)
    if found is None:
        return Opened(model, tokenizer, base_model(model, find_commit(path, **options)), options=options)
    # an adapter names its base by this alone
    stored = None if options.keys() & {"subfolder", "revision"} else weights_of(path)
    return Opened(model, tokenizer, found["base_model"], found, report, stored, options)
