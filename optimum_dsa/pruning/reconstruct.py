"""Block reconstruction: what is left of a block is trained until it gives what the dense block gave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.func import functional_call

from ..model.walk import Reads, Replay, WalkedBlock
from .configuration import ReconstructConfig
from .source import step_size


REFERENCE = "https://arxiv.org/abs/2510.14444"
HELD_OUT = 1 / 8  # of the calibration windows: they stop the training, and choose its rate
RATES = (3e-4, 1e-3, 3e-3)  # that are tried where none is given
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


class Reconstruct:
    """Trains the kept weights of every block, its biases and norms, so that it gives what the dense model has there.

    min ‖f(X; Ŵ) − f_dense(X_dense)‖² over what was not removed, X being what the pruned blocks before it give: by Adam
    on float32 weights, the masks held, with the rate and up to the step of the lowest loss on held-out windows.

    Costs a forward and a backward pass of the block for 8 sequences a step (three times as much in the first block of
    a model, where rates are tried), and a forward pass of the dense block. Memory: four times the trained weights in
    float32 (five where they have another dtype), and the activations of one batch.

    Args:
        config: steps, and the rate or `None`.
        seed: of the order of the windows.

    Attributes:
        found: block -> [`Reconstruction`].

    The objective of "A Free Lunch in LLM Compression", https://arxiv.org/abs/2510.14444, section 3, for whole blocks.
    """

    reads: Reads = frozenset({"outputs"})

    def __init__(self, config: ReconstructConfig, seed: int = 0):
        self.steps, self.rate, self.seed = config.steps, config.rate, seed
        self.found: dict[str, Reconstruction] = {}

    def __call__(self, walked: WalkedBlock) -> None:
        # Outside the blocks nothing is behind a weight that it could be matched to; and a dense block stays dense.
        if walked.replay is None or not walked.weights:
            return
        names = trained(walked)
        # The caller may be in inference mode, through whose tensors no gradient goes.
        with torch.inference_mode(False), torch.enable_grad():
            training = _Training(walked.replay, names, self.steps, self.seed)
            for rate in RATES if self.rate is None else (self.rate,):
                training.run(rate)
            training.finish()
        for name in names:
            walked.changed(f"{walked.name}.{name}")
        self.found[walked.name] = training.found
        self.rate = training.found.rate


def trained(walked: WalkedBlock) -> list[str]:
    """Names within the block of what is trained: pruned matrices, and all vectors (norms and biases)."""
    pruned = {f"{weight.module}.{weight.attribute}".removeprefix(f"{walked.name}.") for weight in walked.weights}
    return [
        name
        for name, parameter in walked.replay.module.named_parameters()
        if parameter.is_floating_point() and (name in pruned or parameter.dim() == 1)
    ]


class _Training:
    """Trainings of one block from one start, of which the best is kept.

    Attributes:
        found: the [`Reconstruction`] of the best.
    """

    def __init__(self, replay: Replay, names: Sequence[str], steps: int, seed: int):
        self.replay, self.steps, self.seed = replay, steps, seed
        own = dict(replay.module.named_parameters())
        self.own = {name: own[name].data for name in names}
        # Detached, or they would be given gradients that cost time and that nobody takes away again.
        self.fixed = {name: value.detach() for name, value in own.items() if name not in self.own}
        # Where it is in float32 the weight itself is trained, and no copy.
        self.masters = {name: value.detach().float().requires_grad_() for name, value in self.own.items()}
        self.held = {name: value == 0 for name, value in self.own.items() if value.dim() > 1}
        self.best = self.start = {name: value.detach().clone() for name, value in self.masters.items()}
        groups = _groups(replay.samples, step_size(sum(replay.samples)))
        out = max(round(len(groups) * HELD_OUT), 1)
        self.training, self.held_out = groups[:-out], [batch for group in groups[-out:] for batch in group]
        # Of all windows, so that a step does not depend on the batches that it is made of.
        self.mean = sum(float(target.float().square().sum()) for target in replay.targets) / sum(replay.samples)
        before = self._held_out_loss()
        self.found = Reconstruction(before, before, 0.0, 0)

    def run(self, rate: float) -> None:
        """Train from the start at `rate`, and keep the weights of the lowest loss on the held-out windows."""
        for name, value in self.start.items():
            self.masters[name].data.copy_(value)
        optimizer = torch.optim.Adam(self.masters.values(), lr=rate, betas=BETAS)
        look = max(self.steps // LOOKS, 1)
        for step, group in enumerate(islice(self._shuffled(), self.steps)):
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            self._backward(group)
            for name, held in self.held.items():
                # A weight that never has a gradient has no moments either, and Adam leaves it at zero.
                self.masters[name].grad.masked_fill_(held, 0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % look == 0 or step + 1 == self.steps:
                self._look(rate, step + 1)

    def finish(self) -> None:
        """Put the best weights into the block."""
        for name, value in self.best.items():
            self.own[name].copy_(value)

    def _look(self, rate: float, step: int) -> None:
        loss = self._held_out_loss()
        # Not a number is less than nothing, and never kept.
        if loss < self.found.after:
            self.found = replace(self.found, after=loss, rate=rate, steps=step)
            self.best = {name: value.detach().clone() for name, value in self.masters.items()}

    def _block(self, *args, **kwargs):
        """The block with the trained weights in its own dtype."""
        cast = {name: value.to(self.own[name].dtype) for name, value in self.masters.items()}
        return functional_call(self.replay.module, self.fixed | cast, args, kwargs)

    def _backward(self, group: Sequence[int]) -> None:
        """Add the gradients of the mean loss of a group's batches, one batch's activations at a time."""
        samples = sum(self.replay.samples[batch] for batch in group)
        for batch in group:
            (self._lost(batch) / (self.mean * samples)).backward()

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Share of the output that is lost on the held-out windows."""
        whole = sum(self.replay.targets[batch].float().square().sum() for batch in self.held_out)
        return float(sum(map(self._lost, self.held_out)) / whole)

    def _lost(self, batch: int) -> Tensor:
        """Σ ‖block − target‖² over a batch, a scalar in float32."""
        difference = self.replay.run(batch, self._block).float() - self.replay.targets[batch].float()
        return difference.square().sum()

    def _shuffled(self) -> Iterator[Sequence[int]]:
        """The groups to be trained on, without end, in a new order every time round."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for number in torch.randperm(len(self.training), generator=generator).tolist():
                yield self.training[number]


def _groups(samples: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of batches of so many samples each, put together until there are `size` samples."""
    groups: list[list[int]] = [[]]
    for number in range(len(samples)):
        if sum(samples[other] for other in groups[-1]) >= size:
            groups.append([])
        groups[-1].append(number)
    return groups
