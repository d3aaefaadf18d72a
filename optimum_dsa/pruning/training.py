"""Training of a stretch of a model, on windows of which some are held out: these choose the rate, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import mean

import torch
from torch import Tensor

from .source import step_size
from .stretches import Stretch
from .unstructured.grid import StayOnGrid


LOOKS = 8  # at the held-out windows, in the course of a training
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Reconstruction:
    """What training a block did. Losses are shares of its output, on calibration windows that it was not trained on.

    Attributes:
        before, after: Σ ‖block − dense block‖² over Σ ‖dense block‖².
        rate: the learning rate.
        steps: after which the loss was lowest; 0 where none lowered it, and the block is what it was.
    """

    before: float
    after: float
    rate: float
    steps: int


def told(found: Mapping[str, Reconstruction]) -> str:
    """What training did to all blocks, one at least, in a sentence."""
    better = [one for one in found.values() if one.steps]
    before, after = (mean(getattr(one, name) for one in found.values()) for name in ("before", "after"))
    if not better:
        return (
            f"blocks trained: none of {len(found)} came nearer to the dense one on windows held out, and each is what "
            f"it was before ({before:.2%} of their outputs lost)"
        )
    rates = ", ".join(f"{rate:g}" for rate in sorted({one.rate for one in better}))
    rest = len(found) - len(better)
    kept = f"; {rest} came no nearer to the dense one, and {'is what it was' if rest == 1 else 'are what they were'}"
    return (
        f"blocks trained: {before:.2%} of their outputs lost before, {after:.2%} after, on windows held out (mean of "
        f"{len(found)}; rate {rates}{kept if rest else ''})"
    )


def told_whole(found: Mapping[str, float]) -> str:
    """What training a whole model did, the fields of a [`Reconstruction`] in nats a token, in a sentence."""
    better = f"{found['after']:.4f} after {found['steps']} steps at a rate of {found['rate']:g}"
    return (
        f"the whole model trained: {found['before']:.4f} nats a token from the dense one's predictions before, "
        f"{better if found['steps'] else 'and nothing came nearer'}, on windows held out"
    )


class Training:
    """Trainings of one stretch from one start, of which the best is kept.

    Of weights that lie on a grid of `bits`, what is trained is moved to the numbers nearest to it wherever it is used,
    and has the gradient of those (a straight-through step, Bengio et al., 2013, https://arxiv.org/abs/1308.3432).

    Args:
        on_step: called after every step.

    Attributes:
        found: the [`Reconstruction`] of the best.
    """

    def __init__(
        self,
        stretch: Stretch,
        steps: int,
        seed: int,
        bits: int | None = None,
        on_step: Callable[[], None] = lambda: None,
    ):
        self.stretch, self.steps, self.seed, self.on_step = stretch, steps, seed, on_step
        # Where it is in float32 the weight itself is trained, and no copy.
        self.masters = {name: value.detach().float().requires_grad_() for name, value in stretch.parameters.items()}
        self.held = {name: value == 0 for name, value in stretch.parameters.items() if value.dim() > 1}
        self.grids = {name: StayOnGrid(stretch.parameters[name], bits) for name in self.held} if bits else {}
        self.best = self.start = {name: value.detach().clone() for name, value in self.masters.items()}
        seen = stretch.samples[: len(stretch.samples) - len(stretch.held_out)]
        self.groups = _groups(seen, step_size(sum(seen)))
        # Of all windows, so that a step does not depend on the batches that it is made of.
        self.mean = sum(float(stretch.size(batch)) for batch in range(len(stretch.samples))) / sum(stretch.samples)
        before = self._held_out_loss()
        self.found = Reconstruction(before, before, 0.0, 0)

    def run(self, rate: float) -> None:
        """Train from the start at `rate`, and keep the weights of the lowest loss on the held-out windows."""
        self.undo()
        optimizer = torch.optim.Adam(self.masters.values(), lr=rate, betas=BETAS)
        look = max(self.steps // LOOKS, 1)
        for step, group in enumerate(islice(self._shuffled(), self.steps)):
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            self._backward(group)
            for name, held in self.held.items():
                # A weight that never has a gradient has no moments either, and Adam leaves it at zero.
                if self.masters[name].grad is not None:
                    self.masters[name].grad.masked_fill_(held, 0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % look == 0 or step + 1 == self.steps:
                self._look(rate, step + 1)
            self.on_step()

    def undo(self) -> None:
        """Give back the weights of the start; where they are trained without a copy, to the stretch as well."""
        for name, value in self.start.items():
            self.masters[name].data.copy_(value)

    def loss(self) -> float:
        """Share of the output that is lost on the held-out windows, by the stretch as it is now."""
        with torch.no_grad():
            return self._share(self.stretch.parameters)

    def finish(self) -> None:
        """Make the best weights the stretch's own."""
        for name, value in self.best.items():
            self.stretch.parameters[name].copy_(self._placed(name, value))

    def _look(self, rate: float, step: int) -> None:
        loss = self._held_out_loss()
        # Not a number is less than nothing, and never kept.
        if loss < self.found.after:
            self.found = replace(self.found, after=loss, rate=rate, steps=step)
            self.best = {name: value.detach().clone() for name, value in self.masters.items()}

    def _backward(self, group: Sequence[int]) -> None:
        """Add the gradients of the mean loss of a group's batches, one batch's activations at a time."""
        samples = sum(self.stretch.samples[batch] for batch in group)
        for batch in group:
            (self.stretch.lost(batch, self._values()) / (self.mean * samples)).backward()

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        return self._share(self._values())

    def _share(self, values: Mapping[str, Tensor]) -> float:
        """What is lost on the held-out windows, of what there is."""
        whole = sum(self.stretch.size(batch) for batch in self.stretch.held_out)
        return float(sum(self.stretch.lost(batch, values) for batch in self.stretch.held_out) / whole)

    def _values(self) -> dict[str, Tensor]:
        """What is trained in the stretch's own type, for that is the model that is made."""
        return {
            name: self._placed(name, value).to(self.stretch.parameters[name].dtype)
            for name, value in self.masters.items()
        }

    def _placed(self, name: str, value: Tensor) -> Tensor:
        """What is trained, of any shape, on its grid if it has one, with the gradient of what it is there."""
        if name not in self.grids:
            return value
        # The difference is zero, bit for bit, and hands the gradient on.
        return self.grids[name](value.detach()) + (value - value.detach())

    def _shuffled(self) -> Iterator[Sequence[int]]:
        """The groups to be trained on, without end, in a new order every time round."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for number in torch.randperm(len(self.groups), generator=generator).tolist():
                yield self.groups[number]


def _groups(samples: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of batches of so many samples each, put together until there are `size` samples."""
    groups: list[list[int]] = [[]]
    for number in range(len(samples)):
        if sum(samples[other] for other in groups[-1]) >= size:
            groups.append([])
        groups[-1].append(number)
    return groups
