"""What a model in memory is known to come from: the `dsa_config.json` in the folder that it was loaded from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..common.files import read_json
from ..model.adapters import inner_model
from ..model.parameters import count_parameters
from ..packed.pack_model import seen_dense
from ..pruning.configuration import CONFIG_NAME
from ..pruning.other_head import is_other_head, report_for
from ..pruning.report import PruningReport
from ..pruning.zeros import counted, found_report
from .description import after, read_description, report_from
from .save import base_model


def report_of(model: nn.Module) -> PruningReport:
    """How `model` was pruned, as its own `dsa_config.json` says, with its zeros as they are counted now.

    A sparse model from elsewhere has no such file: then the allocation is what was counted, and has the name
    `MEASURED`: how the zeros came about, nothing says, and `verify` holds them against no pattern.
    """
    described = described_report(model)
    if described is not None:
        return counted(described, model)
    return found_report(model)


def described_report(model: nn.Module) -> PruningReport | None:
    """How `model` was pruned, as the `dsa_config.json` in its folder says; `None` where there is none.

    Under another head than it was saved with, in the names and with the parameters that it has now; with these, too,
    for other labels or more words.
    """
    inner = inner_model(model)
    described = _described(inner)
    if not described:
        return None
    with seen_dense(inner):
        report, parameters = report_for(inner, report_from(described)), count_parameters(inner)
    folder = Path(inner.config.name_or_path)
    stated = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    stated = stated if isinstance(stated, dict) else {}
    other = is_other_head(inner, stated.get("architectures") or ()) or _is_resized(inner.config, stated)
    return replace(report, parameters=parameters) if other else report


def _is_resized(config: Any, stated: Mapping[str, Any]) -> bool:
    """Whether a model's configuration has another number of labels, or of words, than its config.json's content."""
    labels, text = stated.get("id2label"), stated.get("text_config")
    words = (text if isinstance(text, Mapping) else stated).get("vocab_size")
    # two labels are what transformers makes of none
    counted = len(labels) if isinstance(labels, Mapping) else 2
    own = getattr(config.get_text_config(), "vocab_size", None)
    return getattr(config, "num_labels", counted) != counted or (words is not None and words != own)


def base_of(model: nn.Module, known: dict[str, str | None] | None = None) -> dict[str, str | None]:
    """Name and revision of the dense model that `model` comes from, as far as it says so.

    Args:
        known (`dict[str, str | None]`, *optional*): what is known of a model that says nothing: where it was loaded
            from.
    """
    inner = inner_model(model)
    return _described(inner).get("base_model") or known or base_model(inner)


def training_of(model: nn.Module) -> dict[str, Any] | None:
    """What trained `model` since it was pruned, or meanwhile, as far as it says so."""
    return _described(inner_model(model)).get("recovery")


def known_of(
    model: nn.Module, report: PruningReport | None, training: Mapping[str, Any] | None
) -> tuple[PruningReport | None, tuple[Mapping[str, Any], ...]]:
    """What made `model` so far, before it is pruned: its report, and what trained it, first to last.

    Args:
        report, training: of a model that was pruned, trained or loaded here; else its folder tells.
    """
    known = report or described_report(model)
    last = training_of(model) if report is None else training
    return known, (*(known.trained_before if known else ()), *after(last, {}).get("earlier", ()))


def _described(model: nn.Module) -> dict[str, Any]:
    """The `dsa_config.json` in the folder that `model` was loaded from; empty where there is none."""
    path = Path(getattr(getattr(model, "config", None), "name_or_path", "") or "", CONFIG_NAME)
    return (read_description(path) or {}) if path.is_file() else {}
