"""What a learner makes of a model that is to become smaller."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ....model.examples import check_causal
from ....model.inputs import KINDS, kind_of
from ...calibration import Calibration
from ..widths.dense import Dense
from .budget import Projection
from .gates import Gates
from .learner import LEARNERS, Choice, Problem, learn


def check_learnable(model: nn.Module, calibration: Calibration, learner: str) -> None:
    """Raise `ValueError` where there is no text whose next tokens a learner could learn from."""
    if (kind := kind_of(model)) != "causal" or set(calibration.inputs) != {"input_ids"}:
        what = (
            f"{type(model).__name__} {KINDS[kind]}" if kind != "causal" else f"inputs are {sorted(calibration.inputs)}"
        )
        raise ValueError(
            f"learner={learner!r} learns from the next tokens of text, given as input_ids alone, and here {what}; "
            "leave it out, and choose by an importance."
        )
    check_causal(model, calibration.inputs["input_ids"])


def learned(dense: Dense, projection: Projection, folder: str | Path | None = None, resume: bool = False) -> Choice:
    """Which structures go, and what the rest is multiplied by; adapters learned beside are in the weights."""
    model, config = dense.model, dense.config
    rate = LEARNERS.fact(config.learner, "rate") if config.learn_rate is None else config.learn_rate
    problem = Problem(
        model,
        Gates(model, dense.units),
        projection,
        {unit: each.to(model.device) for unit, each in dense.importances.items()},
        dense.calibration.inputs["input_ids"],
        steps=config.learn_steps,
        rate=rate,
        batch_size=config.batch_size,
        seed=config.data.seed,
    )
    return learn(config.learner, problem, folder, resume)
