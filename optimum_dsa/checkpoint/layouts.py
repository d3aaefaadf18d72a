"""What configuration and class of a checkpoint say of its model's shape: a row per layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.registry import Registry
from ..model.model_class import model_class
from ..model.per_layer import is_per_layer, per_layer_class


@dataclass(frozen=True)
class Layout:
    """A kind of model that a folder may hold.

    Attributes:
        fits (`Callable`): the content of a `config.json` -> whether it speaks of this kind.
        model_class (`Callable`): the configuration, where it is from, and options of `from_pretrained` -> the class
            that loads the weights.
    """

    fits: Callable[[Mapping[str, Any]], bool]
    model_class: Callable[[Any, str | Path, Mapping[str, Any]], type]


LAYOUTS = Registry("layout")

# Every shape is the one that transformers makes of the configuration; whatever no other row fits is this.
LAYOUTS.add("plain", Layout(lambda stated: True, model_class))

# Layers have widths of their own: the class is this package's, whether the file of it beside the weights is trusted or
# not, and what else that names is not run.
LAYOUTS.add("per_layer", Layout(is_per_layer, per_layer_class))


def layout_of(stated: Any) -> Layout:
    """The row for the content of a `config.json`: the last that was added of those that fit."""
    content = stated if isinstance(stated, Mapping) else {}
    # Special rows come after the plain one, which fits everything.
    return next(layout for layout in reversed(LAYOUTS.values()) if layout.fits(content))
