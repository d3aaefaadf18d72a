"""`allocation="auto"`: every named allocator is tried for real, and the best is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..data import SAMPLES
from ..pruning.allocate import architecture_for
from ..pruning.allocation import ALLOCATIONS
from ..pruning.calibration import Calibration, load_calibration
from ..pruning.configuration import DSAConfig
from .problem import Budget
from .realise import check_searchable
from .search import search


logger = logging.getLogger(__name__)

# Windows that candidates are judged on, as a share of those that calibrate: they are few, and a loss over a few
# thousand tokens tells allocations apart that differ by more than a per cent.
SHARE = 0.25


@dataclass(frozen=True)
class Settled:
    """What "auto" came to.

    Attributes:
        config (`DSAConfig`): with the name of the best allocation.
        calibration (`Calibration`): without the windows that decided.
        compared (`Mapping[str, float]`): name -> validation loss of the model pruned with it, best first.
    """

    config: DSAConfig
    calibration: Calibration
    compared: Mapping[str, float]


def settle(model: nn.Module, source: Any, config: DSAConfig, tokenizer: Any = None) -> Settled:
    """The best of all rows of `ALLOCATIONS` for `config`, each pruned with and judged on windows of its own.

    Costs a prune for each. Windows of text are drawn beside those that calibrate; of tensors, which are used whole,
    the last fifth is kept back. The model is not changed.

    Args:
        source (`Any`): as in `DSAPruner.prune`; text, or token ids.

    Raises:
        ValueError: there is no text, or nothing to allocate.
    """
    check_searchable(config)
    if source is None:
        raise ValueError("allocation='auto' compares allocations on text; pass some, or name an allocation.")
    architecture_for(model, config)  # a model that cannot be pruned is refused before any text is read
    calibration, validation = _apart(model, source, config, tokenizer)
    result = search(
        model,
        calibration,
        validation,
        replace(config, allocation="uniform"),
        strategy="named",
        budget=Budget(),
        finalists=len(ALLOCATIONS),
        realisation="masks",  # all are pruned for real: what they race by decides nothing
    )
    compared = {row.candidate.function: row.loss for row in result.finalists}
    best = next(iter(compared))
    logger.info("Of %d allocations, %s leaves the lowest loss on validation windows.", len(compared), best)
    return Settled(replace(config, allocation=best), calibration, compared)


def _apart(model: nn.Module, source: Any, config: DSAConfig, tokenizer: Any) -> tuple[Calibration, Tensor]:
    """Windows that calibrate, and others to judge by, (windows, length)."""
    number = config.data.num_samples or SAMPLES
    more = max(int(SHARE * number), 1)
    drawn = load_calibration(source, model, tokenizer, replace(config.data, num_samples=number + more))
    tokens = drawn.inputs.get("input_ids")
    if tokens is None or len(drawn.inputs) > 1:
        raise ValueError(
            f"allocation='auto' judges by the predictions of text, and the inputs are {sorted(drawn.inputs)}; give "
            "input_ids alone, or name an allocation."
        )
    if len(tokens) < 2:
        raise ValueError("allocation='auto' needs windows to judge by beside those that calibrate; give two at least.")
    kept = len(tokens) - max(int(len(tokens) * SHARE / (1 + SHARE)), 1)
    return replace(drawn, inputs={"input_ids": tokens[:kept]}), tokens[kept:]
