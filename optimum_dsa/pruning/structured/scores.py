"""What gradients tell of a model's structures before any goes, where an importance reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .configuration import DSAStructuredConfig
from .gradients import Products, collect_products
from .importance import IMPORTANCES, importance_of
from .structure import Structures


def products_of(
    model: nn.Module,
    units: Mapping[str, Structures],
    batches: Sequence[Mapping[str, Tensor]],
    config: DSAStructuredConfig,
) -> dict[str, list[Products]]:
    """Unit -> weights times gradients, of the model as it is: before anything goes; empty where nobody reads them.

    Args:
        batches (`Sequence[Mapping[str, Tensor]]`): a sample each, inputs of the model by name, (1, length, ...).

    Raises:
        ValueError: they are of experts that are modules, of which none are taken.
    """
    read = {
        unit: each
        for unit, each in units.items()
        if IMPORTANCES.fact(importance_of(each.kind, config.importance), "gradients")
    }
    if not read:
        return {}
    if unknown := [unit for unit, each in read.items() if each.wholes]:
        raise ValueError(
            f"importance={config.importance!r} takes gradients of experts that share a parameter, and those of "
            f"{unknown[0]} are modules each; use importance='reap'."
        )
    needed = IMPORTANCES.fact(config.importance, "gradients")
    return collect_products(model, read, batches, needed, config.blockwise)
