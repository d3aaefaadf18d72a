"""Chances to stay, learned from forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .learner import LEARNERS, Choice, Problem, gone


SAMPLES = 2  # masks that are drawn and tried in each step
MOVING = 5  # the baseline is a moving mean over about so many steps
SMALL = 1e-7


@LEARNERS.register("policy_gradient", reference="https://arxiv.org/abs/2406.10576", rate=2e-3, gradients=False)
class PolicyGradient:
    """Every structure stays with a chance s of its own; masks are drawn, run, and s follows what they cost.

    m ~ Bernoulli(s), δ ← (1 − 1/5) δ + 1/5 mean_k L_k, g = 1/(K − 1) Σ_k (L_k − δ) (m_k − s)/√(s (1 − s)), and
    s ← Proj(s − η g) with η falling to zero by a cosine, where Proj takes the same number from all of a kind, and cuts
    to [0, 1], until as many parameters are expected to stay as the budget leaves of it. No gradient is taken, so that
    a step costs 2 forward passes and no memory.

    Gao et al., 2025, "Bypass Back-propagation", https://arxiv.org/abs/2406.10576, equations 4 to 8 and its code.
    """

    def __init__(self, problem: Problem):
        self.problem, self.generator = problem, torch.Generator().manual_seed(problem.seed)
        self.baseline: float | None = None
        kept = problem.projection.keep(problem.scores)
        kinds: dict[str, list[str]] = {}
        for unit in problem.scores:
            kinds.setdefault(problem.gates.structures[unit].kind, []).append(unit)
        self.kinds = list(kinds.values())
        self.stay = [sum(int(kept[unit].sum()) for unit in units) for units in self.kinds]
        self.chances = {unit: _normal(each).sigmoid() for unit, each in problem.scores.items()}
        self._project()

    def _project(self) -> None:
        for units, stay in zip(self.kinds, self.stay):
            together = projected(torch.cat([self.chances[unit] for unit in units]), stay)
            parts = together.split([len(self.chances[unit]) for unit in units])
            self.chances |= dict(zip(units, parts))

    @torch.no_grad()
    def step(self, number: int) -> float:
        rows, tried = self.problem.rows(number), []
        for _ in range(SAMPLES):
            drawn = {
                unit: torch.bernoulli(each.cpu(), generator=self.generator).to(each)
                for unit, each in self.chances.items()
            }
            tried.append((drawn, self.problem.loss(rows, drawn).item()))
        mean = sum(loss for _, loss in tried) / SAMPLES
        self.baseline = mean if self.baseline is None else (1 - 1 / MOVING) * self.baseline + mean / MOVING
        rate = self.problem.rate * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * number / self.problem.steps)).item())
        for unit, chance in self.chances.items():
            spread = ((chance + SMALL) * (1 - chance + SMALL)).sqrt()
            slope = sum((loss - self.baseline) * (drawn[unit] - chance) / spread for drawn, loss in tried)
            self.chances[unit] = chance - rate * slope / (SAMPLES - 1)
        self._project()
        return mean

    def state(self) -> dict[str, Any]:
        return {
            "chances": {unit: each.clone() for unit, each in self.chances.items()},
            "baseline": self.baseline,
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.chances = {unit: state["chances"][unit].to(each) for unit, each in self.chances.items()}
        self.baseline = state["baseline"]
        self.generator.set_state(state["generator"])

    def close(self, ended: bool) -> None:
        """Nothing is left in the model."""

    def choice(self) -> Choice:
        return Choice(gone(self.problem.projection.keep(self.chances)), {})


def projected(values: Tensor, most: float) -> Tensor:
    """The nearest of `values`, (n,), in [0, 1] whose sum is `most` at most: clip(values − v) with the least v ≥ 0."""
    if values.clamp(0, 1).sum() <= most:
        return values.clamp(0, 1)
    low, high = 0.0, float(values.max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (values - middle).clamp(0, 1).sum() > most else (low, middle)
    return (values - high).clamp(0, 1)


def _normal(importances: Tensor) -> Tensor:
    """Importances of a unit with mean 0 and deviation 1, (structures,)."""
    found = importances.float()
    return (found - found.mean()) / found.std(correction=0).clamp_min(SMALL)
