"""`allocation="auto"`: every named allocator is tried for real, and the best is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..data import SAMPLES
from ..pruning.allocate import architecture_for
from ..pruning.allocation import measured_in_one_walk
from ..pruning.calibration import Calibration, load_calibration
from ..pruning.comparison import SHARE, compared_lines, windows_apart
from ..pruning.configuration import AUTO, DSAConfig
from .problem import Budget
from .realise import check_searchable
from .search import search
from .still import with_still


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """What "auto" came to.

    Attributes:
        config (`DSAConfig`): with the name of the best allocation.
        calibration (`Calibration`): without the windows that decided.
        compared (`Mapping[str, float]`): name -> validation loss of the model pruned with it, best first.
        compared_on (`Mapping[str, int]`): `windows` and their `length` that those losses are of.
    """

    config: DSAConfig
    calibration: Calibration
    compared: Mapping[str, float]
    compared_on: Mapping[str, int]

    def facts(self) -> dict[str, Mapping]:
        """Fields of a [`PruningReport`]."""
        return {"compared": self.compared, "compared_on": self.compared_on}


def settle(model: nn.Module, source: Any, config: DSAConfig, tokenizer: Any = None) -> Settled:
    """What `config` leaves open, chosen by prunes that are judged on windows of their own.

    Of `allocation="auto"` the best of the rows of `ALLOCATIONS` that one walk measures; of method "d2prune" the
    matrices that its update leaves alone. Costs a prune for each. Windows of text are drawn beside those that
    calibrate; of tensors, which are used whole, the last fifth is kept back. The model is not changed.

    Args:
        source (`Any`): as in `DSAPruner.prune`; text, or token ids.

    Raises:
        ValueError: there is no text, or nothing to allocate.
    """
    if config.allocation == AUTO:
        check_searchable(config)
    what = "allocation='auto'" if config.allocation == AUTO else f"method={config.method!r}"
    if source is None:
        raise ValueError(f"{what} compares prunes on text; pass some, or name {_instead(config)}.")
    architecture_for(model, config)  # a model that cannot be pruned is refused before any text is read
    calibration, validation = _apart(model, source, config, tokenizer, what)
    settled = Settled(config, calibration, {}, {})
    if config.allocation == AUTO:
        settled = _best_allocation(model, calibration, validation, config)
    if config.chooses_still:
        settled = replace(settled, config=with_still(model, calibration, validation, settled.config))
    return settled


def _instead(config: DSAConfig) -> str:
    """What to name so that nothing is tried."""
    return "an allocation" if config.allocation == AUTO else "the matrices that are left as they are with `still`"


def _best_allocation(model: nn.Module, calibration: Calibration, validation: Tensor, config: DSAConfig) -> Settled:
    """The best allocation, judged on `validation`, (windows, length) int64."""
    on = dict(zip(("windows", "length"), validation.shape))
    logger.info(
        "allocation='auto': each of %d allocations is pruned with, and judged on %d windows of %d tokens that do not "
        "calibrate.",
        len(measured_in_one_walk()),
        *validation.shape,
    )
    result = search(
        model,
        calibration,
        validation,
        replace(config, allocation="uniform"),
        strategy="named",
        budget=Budget(),
        finalists=len(measured_in_one_walk()),
        realisation="masks",  # all are pruned for real: what they race by decides nothing
    )
    compared = {row.candidate.function: row.loss for row in result.finalists}
    logger.info("allocation='auto': %s.", "; ".join(compared_lines(compared, on).values()))
    return Settled(replace(config, allocation=next(iter(compared))), calibration, compared, on)


def _apart(model: nn.Module, source: Any, config: DSAConfig, tokenizer: Any, what: str) -> tuple[Calibration, Tensor]:
    """Windows that calibrate, and others by which `what` is to be tried is judged, (windows, length)."""
    number = config.data.num_samples or SAMPLES
    more = windows_apart(number)
    drawn = load_calibration(source, model, tokenizer, replace(config.data, num_samples=number + more))
    tokens = drawn.inputs.get("input_ids")
    if tokens is None or len(drawn.inputs) > 1:
        raise ValueError(
            f"{what} judges by the predictions of text, and the inputs are {sorted(drawn.inputs)}; give input_ids "
            f"alone, or name {_instead(config)}."
        )
    if len(tokens) < 2:
        raise ValueError(f"{what} needs windows to judge by beside those that calibrate; give two at least.")
    kept = len(tokens) - max(int(len(tokens) * SHARE / (1 + SHARE)), 1)
    return replace(drawn, inputs={"input_ids": tokens[:kept]}), tokens[kept:]
