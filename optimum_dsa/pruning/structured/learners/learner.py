"""What all learners share: the problem, the loss, the loop with its trace, and going on after an interruption."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ....common.fences import has_device_map
from ....common.progress import Progress
from ....common.registry import Registry
from ....common.same_run import check_same_run
from .budget import Projection
from .gates import Gates


logger = logging.getLogger(__name__)

# Learner -> its class; the fact `rate` is the learning rate where none is given, `gradients` whether it needs any.
LEARNERS = Registry("learner")
KEPT_EVERY = 10  # steps between two states on the disk


@dataclass(frozen=True)
class Problem:
    """What a learner works on.

    Attributes:
        model: a causal language model; its weights are frozen.
        gates: of all units.
        projection: the budget.
        scores: unit -> importances to begin with, (structures,) float32, non-negative.
        tokens: (windows, length) int64, that it learns from.
        steps: how many it takes.
        rate: its learning rate.
        batch_size: windows of one step.
        prompt: token ids put before every window, (n,) int64; nothing is asked of them.
    """

    model: nn.Module
    gates: Gates
    projection: Projection
    scores: Mapping[str, Tensor]
    tokens: Tensor
    steps: int
    rate: float
    batch_size: int = 8
    seed: int = 0
    prompt: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if has_device_map(self.model) else self.model.device

    def rows(self, step: int) -> Tensor:
        """The windows of a step, (batch_size, length): all in turn, in an order of their own every time around."""
        # By the number of the step alone, so that a run that goes on sees what an uninterrupted one sees.
        number, wanted = len(self.tokens), min(self.batch_size, len(self.tokens))
        turn, place = divmod(step * wanted, number)
        orders = [
            torch.randperm(number, generator=torch.Generator().manual_seed(self.seed + 7919 * (turn + more)))
            for more in (0, 1)
        ]
        return self.tokens[torch.cat(orders)[place : place + wanted]]

    def loss(self, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the next tokens of `rows`, (windows, length), with these gates."""
        logits = self._predicted(rows, values)
        return cross_entropy(logits, rows[:, 1:].flatten().to(logits.device))

    def divergence(self, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Mean KL divergence of the next tokens of `rows`, (windows, length), with these gates from those without."""
        with torch.no_grad():
            dense = log_softmax(self._predicted(rows, {}), dim=-1)
        gated = log_softmax(self._predicted(rows, values), dim=-1)
        return kl_div(gated, dense, log_target=True, reduction="batchmean")

    def _predicted(self, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Logits of the next tokens with gates, (windows · (length − 1), vocabulary) float32."""
        rows = rows.to(self.device)
        given = torch.cat([self.prompt.to(rows).expand(len(rows), -1), rows], dim=1)
        with self.gates.at(values):
            logits = self.model(input_ids=given, use_cache=False).logits[:, len(self.prompt) : -1]
        return logits.float().flatten(0, 1)


@dataclass(frozen=True)
class Choice:
    """What a learner came to.

    Attributes:
        gone: unit -> the numbers of the structures that go, ascending.
        scales: unit -> what the rest is multiplied by, (structures,) float32; empty where it stays as it is.
        losses: of every step.
    """

    gone: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, Tensor]
    losses: tuple[float, ...] = ()


class Learner(Protocol):
    """One way to learn which structures stay. `state` holds all that its next step depends on, as tensors."""

    def __init__(self, problem: Problem): ...

    def step(self, number: int) -> float:
        """Learn from the windows of a step; returns their loss."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def close(self, ended: bool) -> None:
        """Leave nothing in the model but, where all steps have `ended`, what it learned to be in the weights."""

    def choice(self) -> Choice: ...


def learn(
    name: str,
    problem: Problem,
    folder: str | Path | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Choice:
    """What the learner `name` comes to after all steps.

    Args:
        folder (`str`, *optional*): where its state is kept every 10 steps; a run that was killed goes on from there
            with `resume`, to the same end.
        settings (`Mapping[str, Any]`, *optional*): what decides the result, as `settings_of` gives it.

    Raises:
        ValueError: a loss is not finite, or the state in `folder` is of a run with other settings.
    """
    facts = _facts(problem, settings or {})
    model, training = problem.model, problem.model.training
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    learner, losses, ended = None, [], False
    model.eval()
    model.requires_grad_(False)
    try:
        # Whoever calls may have switched gradients off.
        with torch.inference_mode(False), torch.enable_grad():
            learner = LEARNERS[name](problem)
            place = place_of(name, folder) if folder is not None else None
            if resume and place is not None and place.exists():
                losses = _restored(place, learner, facts)
            elif resume and place is not None:
                logger.warning("%s is not there to go on from; learning begins anew.", place)
            progress = Progress("Learning what stays", problem.steps)
            progress.show(len(losses))
            for number in range(len(losses), problem.steps):
                losses.append(learner.step(number))
                if not torch.isfinite(torch.tensor(losses[-1])):
                    raise ValueError(
                        f"Step {number + 1} of {name} has a loss of {losses[-1]}; give a lower rate than "
                        f"{problem.rate:g}, or load the model in float32 or bfloat16."
                    )
                progress.advance(loss=f"{losses[-1]:.4f}")
                if place is not None and ((number + 1) % KEPT_EVERY == 0 or number + 1 == problem.steps):
                    _keep(place, {"facts": facts, "losses": losses, "learner": learner.state()})
            progress.close()
            ended = True
    finally:
        if learner is not None:
            learner.close(ended)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(asked.get(key, True))
        model.train(training)
    found = learner.choice()
    return Choice(found.gone, found.scales, tuple(losses))


def place_of(name: str, folder: str | Path) -> Path:
    """Where a learner's state is kept in a folder."""
    return Path(folder) / f"{name}.pt"


def gone(kept: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Unit -> the numbers of what goes, of which structures stay, (structures,) bool."""
    return {unit: tuple((~stays).nonzero().flatten().tolist()) for unit, stays in kept.items()}


def _facts(problem: Problem, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a state depends on, as JSON values, to be compared when a run goes on."""
    own = {
        "learn_steps": problem.steps,
        "learn_rate": problem.rate,
        "batch_size": problem.batch_size,
        "prompt": problem.prompt.tolist(),
    }
    return json.loads(json.dumps({**settings, **own}))


def _restored(place: Path, learner: Learner, facts: Mapping[str, Any]) -> list[float]:
    """Losses so far; the learner is put back to where it was."""
    known = torch.load(place, map_location="cpu", weights_only=True)
    check_same_run(f"The run in {place}", known["facts"], facts, "name another folder")
    learner.restore(known["learner"])
    return list(known["losses"])


def _keep(place: Path, state: Mapping[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_suffix(".tmp")
    torch.save(dict(state), temporary)
    os.replace(temporary, place)
