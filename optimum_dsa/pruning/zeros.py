"""What is zero in a model now: counted once, for every place that speaks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..model.adapters import inner_model, plain_name
from ..model.architecture import GRANULARITIES, Architecture, Weight, find_architecture
from ..model.parameters import count_parameters
from ..model.sharded import whole
from ..model.walk import walk_blocks
from ..packed.pack_model import seen_dense
from .allocation import Allocation
from .configuration import CONFIG_NAME, DSAConfig
from .other_head import report_for
from .report import PruningReport


MEASURED = "measured"  # the name of an allocation that nobody gave: the zeros that were found
# A share of zeros that nobody made: weights of a dense model that rounding brought there are fewer by far.
FEWEST_ZEROS = 0.01


def zeros_in(tensor: Tensor) -> int:
    """How many entries of a tensor of any shape are zero; of a sharded one every process has to ask."""
    return int(whole((tensor == 0).sum()))


@torch.no_grad()
def count_zeros(
    model: nn.Module, architecture: Architecture, look: Callable[[Weight, Tensor], None] | None = None
) -> dict[str, int]:
    """Weight name -> how many of its entries are zero; of an offloaded model too, a block at a time.

    Args:
        look (`Callable`, *optional*): is given each weight and what it is, (out_features, in_features).
    """
    found = {}
    for walked in walk_blocks(model, architecture, None):
        for weight in walked.weights:
            found[weight.name] = zeros_in(tensor := walked.tensor(weight))
            if look is not None:
                look(weight, tensor)
    return found


def measured_allocation(model: nn.Module, architecture: Architecture, granularity: str = "block") -> Allocation:
    """The share of zeros in every unit, under plain names."""
    return _shares(count_zeros(model, architecture), architecture, granularity)


def found_report(model: nn.Module) -> PruningReport:
    """The zeros of a model of which nothing says how they came about, or that has none; under plain names."""
    inner = inner_model(model)
    with seen_dense(inner):
        architecture = find_architecture(inner, skip_unprunable=True)
        allocation, parameters = measured_allocation(inner, architecture), count_parameters(inner)
    # A config takes no sparsity of 1, which a model of nothing but zeros has.
    config = DSAConfig(min(allocation.overall, 0.9999), "magnitude", allocation, max_sparsity=1.0)
    left = {"dense": architecture.dense, "dense_sizes": architecture.dense_sizes}
    return PruningReport(config, allocation, allocation.sparsity, parameters, **left)


def counted(report: PruningReport, model: nn.Module) -> PruningReport:
    """`report` with zeros and parameters as they are now, under the names that weights have in `model`.

    A head for other labels, or words that were added, are other parameters of the same model.

    Raises:
        ValueError: the model has other units than the report.
    """
    inner = inner_model(model)
    with seen_dense(inner):
        report = report_for(model, report)
        config = report.config
        architecture = find_architecture(inner, config.blocks, config.exclude, config.include, skip_unprunable=True)
        zeros, parameters = count_zeros(inner, architecture), count_parameters(inner)
    # Reports of earlier releases do not say it: then the units with these names tell.
    for granularity in (report.allocation.granularity,) if report.allocation.granularity else GRANULARITIES:
        found = _shares(zeros, architecture, granularity).sparsity
        if found.keys() == report.allocation.sizes.keys():
            return replace(report, achieved=found, parameters=parameters)
    raise ValueError(
        f"{CONFIG_NAME} speaks of other weights than {type(inner).__name__} has; it belongs to another model."
    )


def recounted(report: PruningReport, model: nn.Module) -> PruningReport:
    """The report of `model`, whose zeros are other ones than `report` says: those that are there, by no method.

    What was cut out of it, and what trained it, stays true.
    """
    return replace(found_report(model), structured=report.structured, trained_before=report.trained_before)


def _shares(zeros: dict[str, int], architecture: Architecture, granularity: str) -> Allocation:
    units = architecture.units(granularity)
    sizes = {plain_name(unit): sum(weight.size for weight in weights) for unit, weights in units.items()}
    counts = {plain_name(unit): sum(zeros[weight.name] for weight in weights) for unit, weights in units.items()}
    return Allocation({unit: counts[unit] / size for unit, size in sizes.items()}, sizes, MEASURED, granularity)
