"""How many weights of which matrix go, where training decides which."""

from __future__ import annotations

from torch import nn

from ...model.adapters import plain_name
from ...model.architecture import Architecture, Weight, find_architecture
from ...model.parameters import count_parameters
from ...pruning.allocate import allocate, architecture_for
from ...pruning.allocation import split_count
from ...pruning.configuration import DSAConfig
from ...pruning.report import PruningReport
from ...pruning.unstructured.patterns import Pattern
from ...pruning.zeros import FEWEST_ZEROS, MEASURED
from ..configuration import RecoveryConfig


def is_dense(report: PruningReport) -> bool:
    """Whether nobody has pruned the model that `report` was counted in."""
    return report.allocation.name == MEASURED and report.sparsity < FEWEST_ZEROS


def with_budget(model: nn.Module, report: PruningReport, config: RecoveryConfig) -> PruningReport:
    """`report`, or for a dense `model` that is to be trained sparse the report of the budget that `config` names.

    The allocation of a dense model is one that needs no data: there is none before training.

    Raises:
        ValueError: a dense model without a budget, a budget beside the one that a pruned model has, or one of which no
            weight goes.
    """
    if not config.moves_zeros:
        return report
    if not is_dense(report):
        # Its budget is the model's own; what is asked beside it would be passed over.
        asked = {name: getattr(config, name) for name in ("sparsity", "allocation", "pattern")}
        for name, value in asked.items():
            if value != getattr(RecoveryConfig, name):
                raise ValueError(
                    f"{name}={value!r} is for a dense model, and this one was pruned to {report.sparsity:.4f}, with "
                    f"an allocation and a pattern of its own, which are its budget; leave {name} out, or train the "
                    "dense model."
                )
        return _with_zeros(report)
    if config.sparsity is None:
        raise ValueError(
            f"{type(model).__name__} is dense, and no budget was given; say sparsity=0.8 or so, with allocation and "
            "pattern where each matrix shall not lose the same, or take a pruned model."
        )
    asked = DSAConfig(config.sparsity, "magnitude", config.allocation, pattern=config.pattern)
    if asked.resolved.allocation_reads:
        raise ValueError(
            f"allocation={config.allocation!r} is computed from data, and a dense model that is trained sparse has "
            "none; give the folder of a search or of a pruned model, whose allocation is taken, or 'uniform'."
        )
    architecture = architecture_for(model, asked)
    allocation = allocate(model, None, asked, architecture)
    left = {"dense": architecture.dense, "dense_sizes": architecture.dense_sizes, "structured": report.structured}
    return _with_zeros(PruningReport(asked, allocation, {}, count_parameters(model), **left))


def _with_zeros(report: PruningReport) -> PruningReport:
    if not any(report.allocation.counts().values()):
        size = sum(report.allocation.sizes.values())
        raise ValueError(
            f"A budget of {report.config.sparsity:g} leaves all {size:,} prunable weights, so there are no zeros to "
            "choose; give a larger sparsity, or train the dense model with transformers' Trainer."
        )
    return report


def counts_of(model: nn.Module, report: PruningReport) -> tuple[dict[Weight, int], Pattern]:
    """Matrix of `model` -> how many of its weights go, and within which sets; without those that lose none.

    Raises:
        ValueError: the model has other units than the report, or a pattern that does not fit a matrix.
    """
    config, counts = report.config, report.allocation.counts()
    found: Architecture = find_architecture(model, config.blocks, config.exclude, config.include, skip_unprunable=True)
    granularity = report.allocation.granularity or found.granularity_of(report.allocation.sizes) or "block"
    pattern, shares = config.resolved.pattern, {}
    for unit, weights in found.units(granularity).items():
        if plain_name(unit) not in counts:
            raise ValueError(f"The budget says nothing of {unit}; it belongs to another model.")
        sizes = {weight.name: weight.size for weight in weights}
        floors = {} if pattern.in_groups else {name: report.zeros_before.get(plain_name(name), 0) for name in sizes}
        divided = split_count(counts[plain_name(unit)], sizes, floors)
        shares |= {weight: divided[weight.name] for weight in weights if divided[weight.name]}
    for weight in shares:
        pattern.check(weight.name, weight.shape[1])
        if not weight.parameter(model).requires_grad:
            raise ValueError(f"{weight.name} is frozen (requires_grad=False), so its zeros cannot move; unfreeze it.")
    return shares, pattern
