"""Weights that a model has and its checkpoint lacks: transformers fills them with random numbers, and goes on.

What blocks compute with such numbers is nobody's model. A head that is to be trained yet, such as a classifier's, is
none of it, and may be new.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from torch import nn

from ..common.escaping import one_line


logger = logging.getLogger(__name__)

# Beside the head, what pretraining alone or one way of use needs, and many a checkpoint therefore lacks.
_OPTIONAL = ("pooler.*", "*.pooler.*", "*mask_token", "*masked_spec_embed", "*.mask_emb")


def check_loaded(model: nn.Module, info: Mapping[str, Any], where: str, brought: Iterable[str] = ()) -> None:
    """Hold what transformers says of loading `model` from `where` against what a model cannot do without.

    A new head is said in a warning.

    Args:
        info (`Mapping[str, Any]`): of `from_pretrained`'s `output_loading_info`.
        brought (`Iterable[str]`): modules that an adapter will bring as a whole, by the last part of their names.

    Raises:
        ValueError: the checkpoint lacks a weight of the model under its head.
    """
    missing = sorted(info.get("missing_keys") or ())
    head = {name for name in missing if _is_new(model, name)}
    lacking = [name for name in missing if name not in head]
    if lacking:
        raise ValueError(
            f"{where} lacks {_some(lacking)} of its {type(model).__name__}, which would be random; download or save "
            "it again whole (a GGUF in parts as one file), or correct what its config.json says of layers and "
            "class."
        )
    new = sorted(name for name in head if not set(name.split(".")) & set(brought) and not _is_optional(name))
    if new:
        logger.warning(
            "%s has no weights for the head of its %s, which is new and random: train it before anything that it says "
            "is measured (%s).",
            *(where, type(model).__name__, one_line(_some(new))),
        )


def _is_new(model: nn.Module, name: str) -> bool:
    """Whether a weight is one that a checkpoint of the model may lack: of its head, or of none of its uses here."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if _is_optional(name):
        return True
    if isinstance(base, nn.Module):
        return not name.startswith(f"{prefix}.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and model.get_submodule(name.rpartition(".")[0]) is head


def _is_optional(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _OPTIONAL)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more weights" if len(names) > 3 else "")
