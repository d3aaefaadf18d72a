"""Which of the matrices that make heads an update should leave as they are: every choice is pruned and judged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from torch import Tensor, nn

from ..model.architecture import Architecture, find_architecture
from ..pruning.allocate import allocate, architecture_for
from ..pruning.allocation.layout import place
from ..pruning.calibration import Calibration
from ..pruning.configuration import DSAConfig
from ..pruning.structured.structures import find_structures
from .counts import counts_of
from .objective import Objective
from .realise.masks import Masks


logger = logging.getLogger(__name__)

MOST = 3  # kinds of matrices of which every choice is tried: q, k and v


def with_still(model: nn.Module, calibration: Calibration, validation: Tensor, config: DSAConfig) -> DSAConfig:
    """`config` with the matrices that its update leaves alone, by the lowest perplexity on `validation`.

    A prune for each choice, of q, k and v eight; the model is not changed.

    Args:
        validation (`Tensor`): token ids that do not calibrate, (windows, length) int64.

    Xiong et al., 2026, D²Prune, https://arxiv.org/abs/2601.09176, the dynamic update of attention.
    """
    architecture = architecture_for(model, config)
    kinds = kinds_of_heads(model, architecture, validation[:1, :16])
    if not kinds:
        logger.warning("No matrices of this model are known to make heads: the update changes all of them.")
        return config
    allocation = allocate(model, calibration, config, architecture)
    counts = counts_of(allocation, architecture.units(allocation.granularity))
    objective, found = None, {}
    for choice in _choices(kinds):
        asked = replace(config, update=replace(config.update, still=choice))
        realised = Masks(model, architecture, calibration, asked)
        objective = objective or Objective(model, realised, validation, config.batch_size)
        objective.realisation = realised
        _, found[choice] = objective.sequential(counts, range(len(validation)))
        names = ", ".join(choice) or "none"
        logger.info("%s: %s left as they are: perplexity %.2f.", config.method, names, found[choice])
    best = min(found, key=found.get)
    return replace(config, update=replace(config.update, still=best))


def kinds_of_heads(model: nn.Module, architecture: Architecture, tokens: Tensor) -> list[str]:
    """The kinds of prunable matrices whose rows are heads (q, k, v), seen on some `tokens`, (1, length) int64."""
    pruned = {weight.name for weight in architecture.weights}
    # Of all matrices: heads of which one is excluded are none that could be cut.
    everything = find_architecture(model, skip_unprunable=True)
    structures = find_structures(model, everything, {"input_ids": tokens}).structures
    made = (cut.tensor for each in structures.values() if any(each.heads) for cut in each.makes)
    return list(dict.fromkeys(place(name).kind for name in made if name in pruned))


def _choices(kinds: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every choice of some of them; of many none, all, and each alone."""
    numbers = range(len(kinds) + 1) if len(kinds) <= MOST else (0, 1, len(kinds))
    for number in numbers:
        yield from combinations(kinds, number)
