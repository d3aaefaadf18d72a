"""Gates that are projected onto the budget at every step, and then scales of what stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .learner import LEARNERS, Choice, Problem, gone


SCALING = 0.3  # share of the steps, the last, in which the gates are settled and scales are learned


@LEARNERS.register("projected_gates", reference="https://arxiv.org/abs/2604.19398", rate=0.02, gradients=True)
class ProjectedGates:
    """Scores θ of all structures under one budget: 1 for the highest that fit it, else 0, with σ′(θ) for a gradient.

    The weights are frozen. In the last third of the steps the choice is settled, and what stays learns a scale each,
    which becomes a part of the matrices that read it. Costs a forward and a backward pass a step.

    Wang et al., 2026, "GRASPrune", https://arxiv.org/abs/2604.19398; its rates and steps are not ours.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.scores = {unit: _ranked(each).requires_grad_() for unit, each in problem.scores.items()}
        self.scales = {unit: torch.ones_like(each).requires_grad_() for unit, each in self.scores.items()}
        self.optimizers = [
            torch.optim.Adam(list(values.values()), lr=problem.rate) for values in (self.scores, self.scales)
        ]

    def _kept(self) -> dict[str, Tensor]:
        return self.problem.projection.keep({unit: each.detach() for unit, each in self.scores.items()})

    def step(self, number: int) -> float:
        scaling = number >= round((1 - SCALING) * self.problem.steps)
        kept, values = self._kept(), {}
        for unit, stays in kept.items():
            if scaling:
                values[unit] = torch.where(stays, self.scales[unit], 0)
            else:
                soft = self.scores[unit].sigmoid()
                values[unit] = stays.to(soft) + soft - soft.detach()
        loss = self.problem.loss(self.problem.rows(number), values)
        self.optimizers[scaling].zero_grad()
        loss.backward()
        self.optimizers[scaling].step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {
            "scores": {unit: each.detach().clone() for unit, each in self.scores.items()},
            "scales": {unit: each.detach().clone() for unit, each in self.scales.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        for values, known in ((self.scores, state["scores"]), (self.scales, state["scales"])):
            for unit, value in values.items():
                value.copy_(known[unit])
        for optimizer, known in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(known)

    def close(self, ended: bool) -> None:
        """Nothing is left in the model."""

    def choice(self) -> Choice:
        return Choice(gone(self._kept()), {unit: each.detach().cpu() for unit, each in self.scales.items()})


def _ranked(importances: Tensor) -> Tensor:
    """Importances of a unit as scores to begin with, (structures,): their ranks, from -1 to 1."""
    # Ranks, for importances lie over many powers of ten, and a gradient is to move any of them.
    order = importances.float().argsort(stable=True).argsort(stable=True)
    return (2 * (order.float() + 0.5) / max(len(order), 1) - 1).clone()
