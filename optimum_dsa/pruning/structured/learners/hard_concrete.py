"""Gates of the hard concrete distribution under a Lagrangian, with low-rank adapters beside."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .learner import LEARNERS, Choice, Problem, gone
from .projected_gates import _ranked


logger = logging.getLogger(__name__)

LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3  # the stretched interval and β of Louizos et al., 2018
FLOOR, CEILING = math.log(1e-2), math.log(1e2)  # of log α
WARM = 0.5  # share of the steps over which the budget tightens
RANK = 8  # of the adapters
SMALL = 1e-6
ADAPTER_RATE = 1e-3


@LEARNERS.register(
    "hard_concrete", reference="https://arxiv.org/abs/2310.05015", rate=0.1, gradients=True, needs="peft"
)
class HardConcrete:
    """L0: a gate is drawn with a location log α, and the expected share of what goes is held by two multipliers.

    s = σ((log u − log(1 − u) + log α)/β), z = clip(1.2 s − 0.1, 0, 1), P(z > 0) = σ(log α − β log(0.1/1.1)), and the
    loss is CE + λ₁ (t̂ − t) + λ₂ (t̂ − t)², λ climbing, with t̂ the share of parameters that is expected to go and t
    rising to what was asked over the first half of the steps. Adapters of rank 8 on the queries and values (where PEFT
    knows the family) are trained alongside and become a part of the weights. In the end the least likely go, as the
    budget has it, and the rest keeps σ(0.8 log α/β).

    Guo et al., 2023, "Compresso", https://arxiv.org/abs/2310.05015; gates of Louizos et al., 2018,
    https://arxiv.org/abs/1712.01312.
    """

    def __init__(self, problem: Problem):
        self.problem, self.generator = problem, torch.Generator().manual_seed(problem.seed)
        # All nearly open at first, the more important ones more so.
        self.places = {unit: (2 + _ranked(each)).requires_grad_() for unit, each in problem.scores.items()}
        self.multipliers = torch.zeros(2, requires_grad=True)
        self.whole = sum(size.count * size.cost for size in problem.projection.sizes.values())
        self.adapters = _adapted(problem)
        self.trained = [each for each in problem.model.parameters() if each.requires_grad]
        groups = [{"params": list(self.places.values()), "lr": problem.rate}]
        groups += [{"params": self.trained, "lr": ADAPTER_RATE}] if self.trained else []
        self.optimizer = torch.optim.Adam(groups)
        self.ascent = torch.optim.Adam([self.multipliers], lr=problem.rate, maximize=True)

    def _chances(self) -> dict[str, Tensor]:
        """Unit -> P(z > 0), (structures,)."""
        return {unit: (each - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid() for unit, each in self.places.items()}

    def step(self, number: int) -> float:
        values = {}
        for unit, place in self.places.items():
            drawn = torch.rand(place.shape, generator=self.generator).clamp(SMALL, 1 - SMALL).to(place)
            soft = ((drawn.log() - (1 - drawn).log() + place) / TEMPERATURE).sigmoid()
            values[unit] = (soft * (HIGH - LOW) + LOW).clamp(0, 1)
        loss = self.problem.loss(self.problem.rows(number), values)
        sizes = self.problem.projection.sizes
        gone_share = 1 - sum(each.sum() * sizes[unit].cost for unit, each in self._chances().items()) / self.whole
        asked = self.problem.projection.asked / self.whole
        excess = gone_share - asked * min((number + 1) / max(WARM * self.problem.steps, 1), 1)
        held = self.multipliers[0] * excess + self.multipliers[1] * excess.square()
        for optimizer in (self.optimizer, self.ascent):
            optimizer.zero_grad()
        (loss + held.to(loss.device)).backward()
        for optimizer in (self.optimizer, self.ascent):
            optimizer.step()
        with torch.no_grad():
            for place in self.places.values():
                place.clamp_(FLOOR, CEILING)
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {
            "places": {unit: each.detach().clone() for unit, each in self.places.items()},
            "multipliers": self.multipliers.detach().clone(),
            "trained": [each.detach().clone() for each in self.trained],
            "optimizers": [self.optimizer.state_dict(), self.ascent.state_dict()],
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        for unit, value in self.places.items():
            value.copy_(state["places"][unit])
        self.multipliers.copy_(state["multipliers"])
        for value, known in zip(self.trained, state["trained"]):
            value.copy_(known)
        for optimizer, known in zip((self.optimizer, self.ascent), state["optimizers"]):
            optimizer.load_state_dict(known)
        self.generator.set_state(state["generator"])

    def close(self, ended: bool) -> None:
        if self.adapters is not None:
            self.adapters.merge_and_unload() if ended else self.adapters.unload()
            # Where PEFT notes what it has put into a model.
            vars(self.problem.model).pop("peft_config", None)

    def choice(self) -> Choice:
        kept = self.problem.projection.keep({unit: each.detach() for unit, each in self.places.items()})
        scales = {unit: (0.8 * each.detach() / TEMPERATURE).sigmoid().cpu() for unit, each in self.places.items()}
        return Choice(gone(kept), scales)


def _adapted(problem: Problem) -> Any:
    """Adapters in the model's queries and values, as PEFT's tuner; `None` where it does not know the family."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    torch.manual_seed(problem.seed)
    try:
        return LoraModel(problem.model, LoraConfig(r=RANK, lora_alpha=RANK), "default")
    except ValueError:
        logger.info(
            "hard_concrete: PEFT names no queries and values of %s, so gates are learned without adapters.",
            type(problem.model).__name__,
        )
        return None
