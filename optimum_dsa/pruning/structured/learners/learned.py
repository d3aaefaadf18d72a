"""What a learner makes of a model that is to become smaller."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....common.installation import how_to_install
from ....common.pieces import encode
from ....common.same_run import FINGERPRINTS
from ....model.examples import check_causal
from ....model.inputs import KINDS, check_length, kind_of
from ...calibration import Calibration
from ...finished import settings_of
from ..widths.dense import Dense
from ..widths.latency import fingerprint_of_times
from ..widths.shares import given_allocation
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
    needs = LEARNERS.fact(learner, "needs")
    if needs and find_spec(needs) is None:
        raise ImportError(f"learner={learner!r} needs {needs}: {how_to_install(needs)}; or take another learner.")
    check_causal(model, calibration.inputs["input_ids"])


def prompt_of(text: str | None, tokenizer: Any) -> Tensor:
    """The tokens of what a learner's windows begin with, (n,) int64."""
    if text is not None and tokenizer is None:
        raise ValueError(
            f"learn_prompt={text!r} is text, and there is no tokenizer that reads it; give one, or leave it out."
        )
    return torch.tensor(encode(text, tokenizer) if text else [], dtype=torch.int64)


def check_prompt(prompt: Tensor, dense: Dense) -> None:
    """Raise `ValueError` where the model has no room for a prompt, (n,) int64, before the calibration windows."""
    if len(prompt):
        check_length(len(prompt) + dense.calibration.inputs["input_ids"].shape[1], dense.model)


def learned(dense: Dense, projection: Projection, folder: str | Path | None, resume: bool, prompt: Tensor) -> Choice:
    """Which structures go, and what the rest is multiplied by; adapters learned beside are in the weights.

    `prompt` is put before every window: token ids, (n,) int64.
    """
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
        prompt=prompt,
    )
    given = given_allocation(config.allocation)
    settings = None if folder is None else settings_of(model, dense.calibration, config, given)
    if settings and "latency" in dense.costs:
        settings[FINGERPRINTS]["table of times"] = fingerprint_of_times(dense.costs["latency"])
    return learn(config.learner, problem, folder, resume, settings)
