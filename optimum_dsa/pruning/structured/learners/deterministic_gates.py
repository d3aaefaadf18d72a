"""Gates without chance: numbers from 0 up, shrunk after every step until as few are left as the budget has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .learner import LEARNERS, Choice, Problem, gone
from .projected_gates import _ranked


TILT = 0.05  # how far from 1 gates begin, by the ranks of importances
SEARCHING = 0.7  # share of the steps in which gates shrink; in the rest those that stay adapt
WARM = 0.8  # share of these over which the budget tightens
SMALL = 0.1  # ε: gates that are much larger count as one


@LEARNERS.register("deterministic_gates", reference="https://arxiv.org/abs/2603.08065", rate=0.1, gradients=True)
class DeterministicGates:
    """z = ReLU(θ) stands in front of each structure: nothing is drawn, and what was learned is what runs.

    How many stay is counted by s(z) = (1 + ε) z / (z + ε), and the loss is the divergence of what the model predicts
    from what it predicts without gates. After every step θ ← θ − ν s′(z), with the least ν ≥ 0 that leaves as much as
    the budget has it, which tightens meanwhile: large gates hardly shrink, small ones vanish. After two thirds of the
    steps the smallest go, and what stays adapts, and keeps its z. A step costs two forward passes and a backward pass.

    After Huang et al., 2026, "Deterministic Differentiable Structured Pruning", https://arxiv.org/abs/2603.08065, by
    what its abstract tells: the count, how it is held and the rates are ours.
    """

    def __init__(self, problem: Problem):
        self.problem, self.searching = problem, round(SEARCHING * problem.steps)
        self.places = {unit: (1 + TILT * _ranked(each)).requires_grad_() for unit, each in problem.scores.items()}
        self.optimizer = torch.optim.Adam(list(self.places.values()), lr=problem.rate)

    def _kept(self) -> dict[str, Tensor]:
        return self.problem.projection.keep({unit: each.detach() for unit, each in self.places.items()})

    def step(self, number: int) -> float:
        gates = {unit: each.relu() for unit, each in self.places.items()}
        if number >= self.searching:
            gates = {unit: torch.where(stays, gates[unit], 0) for unit, stays in self._kept().items()}
        loss = self.problem.divergence(self.problem.rows(number), gates)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if number < self.searching:
            self._shrink(min((number + 1) / (WARM * self.searching), 1))
        return loss.item()

    @torch.no_grad()
    def _shrink(self, progress: float) -> None:
        """Take from all gates, from small ones more, until no more is left than the budget allows by now."""
        sizes = self.problem.projection.sizes
        whole = sum(size.count * size.cost for size in sizes.values())
        most = whole - self.problem.projection.asked * progress

        def shrunk(by: float) -> dict[str, Tensor]:
            return {unit: each - by * SMALL / (each.relu() + SMALL) ** 2 for unit, each in self.places.items()}

        def left(places: Mapping[str, Tensor]) -> float:
            counted = {unit: float((each.relu() / (each.relu() + SMALL)).sum()) for unit, each in places.items()}
            return (1 + SMALL) * sum(number * sizes[unit].cost for unit, number in counted.items())

        if left(self.places) <= most:
            return
        # The largest of all gates is gone by the larger of these.
        low, high = 0.0, max(float((each + SMALL).max()) ** 3 / SMALL for each in self.places.values())
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if left(shrunk(middle)) > most else (low, middle)
        for unit, each in shrunk(high).items():
            self.places[unit].copy_(each)

    def state(self) -> dict[str, Any]:
        return {
            "places": {unit: each.detach().clone() for unit, each in self.places.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        for unit, value in self.places.items():
            value.copy_(state["places"][unit])
        self.optimizer.load_state_dict(state["optimizer"])

    def close(self, ended: bool) -> None:
        """Nothing is left in the model."""

    def choice(self) -> Choice:
        return Choice(gone(self._kept()), {unit: each.detach().relu().cpu() for unit, each in self.places.items()})
