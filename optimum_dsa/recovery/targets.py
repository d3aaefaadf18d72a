"""The prunable weights of a model that may carry PEFT adapters, and what is zero in them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.description import read_description, report_from
from ..checkpoint.save import base_model
from ..model.architecture import GRANULARITIES, Architecture, find_architecture, find_stacks
from ..pruning.allocation import Allocation
from ..pruning.configuration import CONFIG_NAME, DSAConfig
from ..pruning.report import PruningReport


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_adapters(model: nn.Module) -> AbstractContextManager:
    """A context in which a PEFT model runs without its adapters."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def plain_name(name: str) -> str:
    """A weight's name without what PEFT puts into it."""
    return name.replace(".base_layer.", ".")


def adapter_matrices(model: nn.Module) -> list[str]:
    """Names of the matrices in the blocks of `model` that adapters brought."""
    if sys.modules.get("peft") is None:  # no adapters without it, and it is slow to import
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    stacks = tuple(f"{stack}." for stack in find_stacks(model))
    found = []
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and path.startswith(stacks):
            base = {id(parameter) for parameter in module.get_base_layer().parameters()}
            found += [
                f"{path}.{name}"
                for name, parameter in module.named_parameters()
                if id(parameter) not in base and parameter.dim() >= 2
            ]
    return found


def with_adapters_excluded(config: DSAConfig, model: nn.Module) -> DSAConfig:
    """`config` with the matrices of adapters left alone."""
    return replace(config, exclude=(*config.exclude, *adapter_matrices(model)))


def prunable(
    model: nn.Module, exclude: Sequence[str] = (), include: Sequence[str] = (), blocks: Sequence[str] = ()
) -> Architecture:
    """The weights of the transformers model `model` that pruning is about; those of adapters are not among them."""
    return find_architecture(model, blocks, (*exclude, *adapter_matrices(model)), include, skip_unprunable=True)


@torch.no_grad()
def count_zeros(model: nn.Module, architecture: Architecture) -> dict[str, int]:
    """Weight name -> how many of its entries are zero."""
    return {weight.name: int((weight.tensor(model) == 0).sum()) for weight in architecture.weights}


def measured_allocation(model: nn.Module, architecture: Architecture, granularity: str = "block") -> Allocation:
    """The share of zeros in every unit, under plain names."""
    zeros = count_zeros(model, architecture)
    units = architecture.units(granularity)
    sizes = {plain_name(unit): sum(weight.size for weight in weights) for unit, weights in units.items()}
    counts = {plain_name(unit): sum(zeros[weight.name] for weight in weights) for unit, weights in units.items()}
    return Allocation({unit: counts[unit] / size for unit, size in sizes.items()}, sizes, "measured", granularity)


def report_of(model: nn.Module) -> PruningReport:
    """How `model` was pruned, as its own `dsa_config.json` says, with its zeros as they are counted now.

    A sparse model from elsewhere has no such file: then the allocation is what was counted, and the rest of the config
    are defaults.
    """
    inner = inner_model(model)
    origin = _origin(inner)
    if origin is not None:
        return counted(origin, model)
    architecture = prunable(inner)
    allocation = measured_allocation(inner, architecture)
    config = DSAConfig(min(allocation.overall, 0.9999), allocation=allocation, max_sparsity=1.0)
    dense = {name: why for name, why in architecture.dense.items() if name not in adapter_matrices(inner)}
    return PruningReport(config, allocation, allocation.sparsity, count_parameters(inner), dense=dense)


def counted(report: PruningReport, model: nn.Module) -> PruningReport:
    """`report` with the zeros as they are now."""
    inner, config = inner_model(model), report.config
    architecture = prunable(inner, config.exclude, config.include, config.blocks)
    for granularity in (report.allocation.granularity,) if report.allocation.granularity else GRANULARITIES:
        found = measured_allocation(inner, architecture, granularity).sparsity
        if found.keys() == report.allocation.sizes.keys():
            return replace(report, achieved=found)
    raise ValueError(
        f"{CONFIG_NAME} speaks of other weights than {type(inner).__name__} has; it belongs to another model."
    )


def plain_report(report: PruningReport) -> PruningReport:
    """`report` under the names that weights have without adapters."""
    allocation = report.allocation
    renamed = [
        {plain_name(key): value for key, value in part.items()} for part in (allocation.sparsity, allocation.sizes)
    ]
    return replace(
        report,
        allocation=Allocation(*renamed, allocation.name, allocation.granularity),
        achieved={plain_name(name): value for name, value in report.achieved.items()},
        dense={name: why for name, why in report.dense.items() if why != "excluded" or ".lora_" not in name},
    )


def base_of(model: nn.Module) -> dict[str, str | None]:
    """Name and revision of the dense model that `model` comes from, as far as it says so."""
    inner = inner_model(model)
    return _described(inner).get("base_model") or base_model(inner)


def _origin(model: nn.Module) -> PruningReport | None:
    """The report in the folder that `model` was loaded from, if it is a pruned model's."""
    data = _described(model)
    return report_from(data) if data else None


def _described(model: nn.Module) -> dict[str, Any]:
    """The `dsa_config.json` in the folder that `model` was loaded from; empty where there is none."""
    path = Path(getattr(getattr(model, "config", None), "name_or_path", "") or "", CONFIG_NAME)
    return (read_description(path) or {}) if path.is_file() else {}


def count_parameters(model: nn.Module) -> int:
    """How many parameters `model` has without those of adapters."""
    adapters = {id(model.get_parameter(name)) for name in adapter_matrices(model)}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in adapters)
