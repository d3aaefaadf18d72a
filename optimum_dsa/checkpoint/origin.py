"""What a model in memory is known to come from: the `dsa_config.json` in the folder that it was loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..model.adapters import inner_model
from ..model.architecture import find_architecture
from ..model.parameters import count_parameters
from ..pruning.configuration import CONFIG_NAME, DSAConfig
from ..pruning.report import PruningReport
from ..pruning.zeros import counted, measured_allocation
from .description import read_description, report_from
from .save import base_model


def report_of(model: nn.Module) -> PruningReport:
    """How `model` was pruned, as its own `dsa_config.json` says, with its zeros as they are counted now.

    A sparse model from elsewhere has no such file: then the allocation is what was counted, and has the name
    `MEASURED`: how the zeros came about, nothing says, and `verify` holds them against no pattern.
    """
    inner = inner_model(model)
    described = _described(inner)
    if described:
        return counted(report_from(described), model)
    architecture = find_architecture(inner, skip_unprunable=True)
    allocation = measured_allocation(inner, architecture)
    # A config takes no sparsity of 1, which a model of nothing but zeros has.
    config = DSAConfig(min(allocation.overall, 0.9999), "magnitude", allocation, max_sparsity=1.0)
    return PruningReport(config, allocation, allocation.sparsity, count_parameters(inner), dense=architecture.dense)


def base_of(model: nn.Module) -> dict[str, str | None]:
    """Name and revision of the dense model that `model` comes from, as far as it says so."""
    inner = inner_model(model)
    return _described(inner).get("base_model") or base_model(inner)


def training_of(model: nn.Module) -> dict[str, Any] | None:
    """What trained `model` since it was pruned, or meanwhile, as far as it says so."""
    return _described(inner_model(model)).get("recovery")


def _described(model: nn.Module) -> dict[str, Any]:
    """The `dsa_config.json` in the folder that `model` was loaded from; empty where there is none."""
    path = Path(getattr(getattr(model, "config", None), "name_or_path", "") or "", CONFIG_NAME)
    return (read_description(path) or {}) if path.is_file() else {}
