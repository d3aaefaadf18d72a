"""A checkpoint as it is opened: the model, its tokenizer, and what is known of its pruning."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..model.adapters import has_adapters, inner_model
from ..pruning.report import PruningReport
from .description import Description, is_unchanged, report_from
from .forms import form_of, is_gguf, located
from .load import find_commit, find_description, load_model, load_tokenizer, stated_in, weights_of
from .save import base_model


logger = logging.getLogger(__name__)

_OF_THE_MODEL = ("revision", "subfolder", "gguf_file")


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
        options (`dict`): that said where it is (`revision`, ...); with `alone`, what lies beside it belongs to others.
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
    path, options = located(str(source), options)
    if tokenizer is not None:  # before the model: of another place, and so of none of the model's revisions
        theirs = {name: value for name, value in options.items() if name not in _OF_THE_MODEL}
        tokenizer = load_tokenizer(tokenizer, required=True, **theirs)
    # Before the model, which takes longer: a broken description is known at once.
    found = find_description(path, **options)
    report = None if found is None else report_from(found)
    if found is not None and not is_unchanged(found):
        logger.warning("The dsa_config.json of %s was changed after it was written.", path)
    stated = {} if options.get("gguf_file") else stated_in(path, Path(path, options.get("subfolder") or ""), options)
    if form := form_of(stated, options, Path(path) if Path(path).is_dir() else None):
        logger.warning("%s: its weights are %s.", str(source), form["form"])
    model = load_model(path, **options)
    tokenizer = load_tokenizer(path if tokenizer is None else tokenizer, **options)
    if tokenizer is None and has_adapters(model):  # which are saved without one, as a rule
        theirs = {name: value for name, value in options.items() if name not in _OF_THE_MODEL}
        tokenizer = load_tokenizer(inner_model(model).config.name_or_path or None, **theirs)
    if found is None:
        base = base_model(model, find_commit(path, **options)) | form
        if "gguf_file" in form and Path(path).is_dir():
            base["name"] = form["gguf_file"]  # the folder may hold any number of them
            if is_gguf(source):
                options = {**options, "alone": True}
        return Opened(model, tokenizer, base, options=options)
    # an adapter names its base by this alone
    stored = None if options.keys() & set(_OF_THE_MODEL) else weights_of(path)
    return Opened(model, tokenizer, found["base_model"], found, report, stored, options)
