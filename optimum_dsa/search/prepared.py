"""What a search asks of a configuration: whether there is anything to search for, and what strategies work with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import singledispatch
from importlib.util import find_spec
from typing import Any

from torch import nn

from ..model.offload import is_offloaded
from ..pruning.allocate import check_dense, say_dense, standing_zeros
from ..pruning.allocation import ALLOCATIONS, measured_in_one_walk
from ..pruning.calibration import Calibration
from ..pruning.configuration import AUTO, DSAConfig
from ..pruning.structured.configuration import DSAStructuredConfig, tells_of_experts
from ..pruning.structured.trial import check_tried
from ..pruning.structured.widths.shares import SHARES
from ..pruning.unstructured.symbolic import LEAVES
from .metric_space import MetricSpace
from .objective import check_predicts
from .realise import REALISATIONS, Realisation, check_searchable, realise, suited
from .realise.structures import StructureWidths
from .resolver import Resolver
from .result import Finalist, rank_correlation
from .strategies import STRATEGIES
from .structures import StructureResolver


@singledispatch
def check_search(config: Any, model: nn.Module | None = None) -> None:
    """Raise `ValueError` where nothing is left to search for, or `model` is not dense or predicts no tokens."""
    raise TypeError(f"A search is for a DSAConfig or a DSAStructuredConfig, got {type(config).__name__}.")


@check_search.register
def _(config: DSAConfig, model: nn.Module | None = None) -> None:
    check_searchable(config)
    if model is not None:
        check_predicts(model)
        check_dense(model, config, "a search")


@check_search.register
def _(config: DSAStructuredConfig, model: nn.Module | None = None) -> None:
    check_tried(config, "A search", model)
    if model is not None:
        check_predicts(model)
    if config.max_loss is not None:
        raise ValueError(
            f"A search divides a share that is known, and max_loss={config.max_loss!r} is to find one; use find_share "
            "first, and give what it finds as sparsity."
        )
    if "expert" in config.structures and config.layout == "padded":
        raise ValueError(
            "A search gives blocks other numbers of experts, and experts leave no zeros; use layout='per_layer'."
        )
    if config.layout == "uniform":
        raise ValueError(
            "A search gives blocks widths of their own, and layout='uniform' has one for all; use layout='per_layer'."
        )


@singledispatch
def without_allocation(config: Any) -> Any:
    """The configuration, with an allocation that stands for none: it is what is searched for."""
    return replace(config, allocation="uniform", spread=None)


@without_allocation.register
def _(config: DSAConfig) -> DSAConfig:
    # One that is given stands in a result as it did; "auto" is none.
    return replace(config, allocation="uniform") if config.allocation == AUTO else config


@singledispatch
def realisation_of(config: Any, strategy: str, asked: str | None) -> str:
    """The row of `REALISATIONS` by which a strategy compares, or the one that is `asked` for."""
    if (
        any(STRATEGIES.fact(strategy, fact) for fact in ("curves", "metrics"))
        or strategy == "exhaustive"
        or asked not in (None, "structures")
    ):
        other = f"strategy {strategy!r}" if asked in (None, "structures") else f"realisation={asked!r}"
        raise ValueError(f"{other} is of single weights; for structures use 'auto', 'evolution' or 'level_switch'.")
    return "structures"


@realisation_of.register
def _(config: DSAConfig, strategy: str, asked: str | None) -> str:
    if STRATEGIES.fact(strategy, "metrics"):
        return _metrics(config, strategy, asked)
    found = asked or ("database" if STRATEGIES.fact(strategy, "curves") else suited(config))
    REALISATIONS[found]  # an unknown name raises
    return found


def _metrics(config: DSAConfig, strategy: str, asked: str | None) -> str:
    """The row of `REALISATIONS` for a search that looks for a metric; `ValueError` where none would be asked."""
    if replace(config, metric="abs(W)").resolved.chooses:
        raise ValueError(
            f"strategy={strategy!r} looks for a metric, and the update {config.recipe.update!r} chooses itself what "
            "goes; use another one, such as method='wanda', or a strategy that looks for an allocation."
        )
    if asked not in (None, "metrics"):
        raise ValueError(f"strategy={strategy!r} compares metrics, and realisation={asked!r} knows one; leave it out.")
    return "metrics"


def metrics_for(model: nn.Module, config: DSAConfig, strategy: str) -> MetricSpace:
    """The metrics that a strategy may try on `model`: without gradients where these cannot be had."""
    leaves = STRATEGIES.fact(strategy, "leaves", tuple(LEAVES))
    without = is_offloaded(model) or config.permute is not None
    return MetricSpace(tuple(n for n in leaves if not (without and LEAVES.fact(n, "reads") == "gradients")))


@singledispatch
def prepared(
    config: Any,
    model: nn.Module,
    calibration: Calibration,
    kind: str,
    named: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[Realisation, Resolver | StructureResolver]:
    """The model as it can be realised, and what makes allocations of candidates."""
    realised = StructureWidths(model, None, calibration, config, **options)
    return realised, StructureResolver(realised, config, named)


@prepared.register
def _(
    config: DSAConfig,
    model: nn.Module,
    calibration: Calibration,
    kind: str,
    named: Sequence[str],
    options: Mapping[str, Any],
) -> tuple[Realisation, Resolver]:
    realised = realise(model, calibration, config, kind, **options)
    say_dense(model, realised.architecture, bool(config.blocks))
    standing = standing_zeros(model, realised.architecture, config)  # raises where more are zero than asked for
    return realised, Resolver(model, realised, calibration, config, named, standing)


@singledispatch
def names_for(config: Any, strategy: str, named: Sequence[str] | None) -> tuple[str, ...]:
    """Allocations that a strategy tries by name besides uniform, which is always tried, and counted once.

    Of structures those of their own as well, but for one that needs what is not installed.
    """
    known = dict.fromkeys([*SHARES, *measured_in_one_walk()])
    if find_spec("scipy") is None:
        known.pop("milp")
    if "expert" in config.structures:
        known = dict.fromkeys(filter(tells_of_experts, known))
    return _named(strategy, known if named is None else named)


@names_for.register
def _(config: DSAConfig, strategy: str, named: Sequence[str] | None) -> tuple[str, ...]:
    if STRATEGIES.fact(strategy, "fixed"):  # the one at which metrics are compared
        return (config.allocation,) if config.allocation in [*ALLOCATIONS] else ()
    return _named(strategy, measured_in_one_walk() if named is None else named)


def _named(strategy: str, named: Iterable[str]) -> tuple[str, ...]:
    tries = STRATEGIES.fact(strategy, "named", True)
    return tuple(name for name in named if name != "uniform") if tries else ()


def remarks(resolver: Resolver | StructureResolver, table: Sequence[Finalist]) -> list[str]:
    """What is to be said of the finalists: how well error curves, where they were read, tell their losses."""
    predicted = (
        [resolver.predicted(row.allocation) for row in table] if isinstance(resolver, StructureResolver) else []
    )
    if len(predicted) < 3 or None in predicted:
        return []
    found = rank_correlation(predicted, [row.loss for row in table])
    return [f"rank correlation of error curves with the prune: {found:.2f} (Spearman), over {len(table)} finalists"]
