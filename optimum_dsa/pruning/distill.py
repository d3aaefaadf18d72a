"""Distillation: what is left of a pruned model is trained, as a whole, until it predicts what the dense model did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from ..common.progress import Progress
from ..model.architecture import Architecture
from ..model.calls import feed, replaced_forwards
from .calibration import Calibration
from .configuration import DSAConfig
from .reconstruct import RATES, seek
from .source import batches_to_train
from .training import Training


if TYPE_CHECKING:
    from .structured.configuration import DSAStructuredConfig

REFERENCE = "https://arxiv.org/abs/1503.02531"
FIRST = 1e-3  # the rate that is tried first
CHUNK = 2**24  # numbers in the predictions that are there at a time


class Distillation:
    """Trains the kept weights of all blocks, their biases and norms, until the model predicts what it did when dense.

    min Σ KL(dense ‖ pruned) over the tokens of the calibration windows, by Adam on float32 weights, the masks held,
    up to the step of the lowest loss on windows held out, at the rate that gets nearest there in a quarter of the
    steps. Made while the model is dense, and called once it is pruned. Of the dense model there stays what its output
    embedding is given, (samples, length, size) for every batch, and no second model. What comes behind an output
    embedding, a cap or a factor, is left out.

    Costs a forward and a backward pass of the model for 4 sequences a step, and as much again to find the rate.
    Memory: four times the trained weights in float32 (five where they have another dtype), and all that the model
    computes of a batch.

    Hinton et al., 2015, https://arxiv.org/abs/1503.02531.

    Args:
        batches: inputs of the model by name, (samples, ...), of which the last `held_out` are not trained on.
        steps: of training.
        seed: of the order of the windows.
        bits: of the grid on which the weights lie, and stay; `None` where they lie on none.

    Raises:
        ValueError: the model predicts no words.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        batches: Sequence[Mapping[str, Tensor]],
        held_out: int,
        steps: int,
        seed: int = 0,
        bits: int | None = None,
    ):
        check_predicts(model)
        self.model, self.batches, self.steps, self.seed, self.bits = model, batches, steps, seed, bits
        self.samples = [len(next(iter(batch.values()))) for batch in batches]
        self.held_out = range(len(batches) - held_out, len(batches))
        self.head = model.get_output_embeddings()
        own = {id(parameter) for parameter in self.head.parameters()}
        pruned = any(id(weight.parameter(model)) in own for weight in architecture.weights)
        # Copies that run while the model's own does not; of one that is pruned as well, what it was.
        self.words, self.dense_words = copy(self.head), deepcopy(self.head) if pruned else copy(self.head)
        with torch.inference_mode(False), torch.no_grad(), _heard(model, self.head) as heard:
            self.targets = [heard(feed, model, batch) for batch in batches]
        self.tokens = [_real(batch, target) for batch, target in zip(batches, self.targets)]

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """Train the model in place, and tell the fields of its [`Reconstruction`].

        Losses are nats a token. `architecture` has the weights that the model has by now.
        """
        self.parameters = trained(self.model, architecture)
        # The caller may be in inference mode, through whose tensors no gradient goes.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _heard(self.model, self.head) as self.heard,
            Progress("Distilling", None, "step", "optimum_dsa.prune") as shown,
        ):
            rate = self._rate(shown.advance)
            training = Training(self, self.steps, self.seed, self.bits, shown.advance)
            training.run(rate)
            training.finish()
        return asdict(training.found)

    def _rate(self, on_step: Callable[[], None]) -> float:
        """The rate at which a quarter of the steps gets nearest."""
        trial = Training(self, max(self.steps // 4, 1), self.seed, self.bits, on_step)
        trial.run(FIRST)
        seek(trial, RATES.index(FIRST))
        trial.undo()
        return trial.found.rate or RATES[0]

    def lost(self, batch: int, values: Mapping[str, Tensor]) -> Tensor:
        """Σ KL(dense ‖ pruned), in nats, over the tokens of a batch with `values` in the place of the weights."""
        # Detached, or what is not trained would be given gradients that cost time, and that nobody takes away again.
        fixed = {name: value.detach() for name, value in self.model.named_parameters() if name not in values}
        whole = {f"model.{name}": value for name, value in (fixed | dict(values)).items()}
        hidden = self.heard(functional_call, _Fed(self.model), whole, (self.batches[batch],))
        real, size = self.tokens[batch], max(CHUNK // _words(self.head), 1)
        parts = zip(hidden[real].split(size), self.targets[batch][real].split(size))
        # Predictions are made again for the gradient: those of all tokens would be the largest thing of all.
        return sum(
            checkpoint(self._divergence, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
        )

    def size(self, batch: int) -> Tensor:
        """How many tokens of a batch are predicted, a scalar."""
        return self.tokens[batch].sum().float()

    def _divergence(self, hidden: Tensor, dense: Tensor) -> Tensor:
        """Σ KL(dense ‖ pruned) of what output embeddings are given, (tokens, size) each; a scalar in float32."""
        own, target = (
            log_softmax(functional_call(head, _fixed(head), (given,)).float(), dim=-1)
            for head, given in ((self.words, hidden), (self.dense_words, dense))
        )
        return kl_div(own, target, reduction="sum", log_target=True)


def distillation_of(
    model: nn.Module,
    architecture: Architecture,
    calibration: Calibration | None,
    config: DSAConfig | DSAStructuredConfig,
    bits: int | None = None,
) -> Distillation | None:
    """The distillation that `config` asks for, of a model that is dense; `None` where it asks for none."""
    if not config.reconstruct.distill:
        return None
    # A sequence at a time: all that the model computes of a batch stays until its gradient is there.
    batches, held_out = batches_to_train(calibration, replace(config, batch_size=1))
    return Distillation(model, architecture, batches, held_out, config.reconstruct.distill, config.data.seed, bits)


class _Fed(nn.Module):
    """A model that is called with a batch, inputs by name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]):
        return feed(self.model, batch)


def check_predicts(model: nn.Module) -> None:
    """Raise `ValueError` for a model that predicts no words."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"distill is for models that learn to predict the dense one's words, and {type(model).__name__} has no "
            "output embedding; use reconstruct=64, which trains block by block, or leave it out."
        )


def trained(model: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """Full name -> what is trained of a model: pruned matrices of its blocks, and all vectors in these."""
    blocks = [block for block in architecture.blocks if block.modules == (block.name,)]  # of others a head is part
    pruned = {f"{weight.module}.{weight.attribute}" for block in blocks for weight in block.weights}
    inside = tuple(f"{block.name}." for block in blocks)
    return {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if name in pruned or (parameter.dim() == 1 and parameter.is_floating_point() and name.startswith(inside))
    }


@contextmanager
def _heard(model: nn.Module, head: nn.Module) -> Iterator:
    """What makes a call of the model and gives what its `head` was given, (samples, length, size), and predicts not.

    The model is in evaluation meanwhile.
    """
    heard: list[Tensor] = []

    def make(index, forward):
        def keep(hidden: Tensor) -> Tensor:
            heard.append(hidden)
            # What follows may be as wide as the words are many (a bias, in BART).
            return hidden.detach()[..., :1].expand(*hidden.shape[:-1], _words(head))

        return keep

    def call(function, *given) -> Tensor:
        heard.clear()
        function(*given)
        (hidden,) = heard
        return hidden

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with replaced_forwards([head], make):
            yield call
    finally:
        for module in training:
            module.training = True


def _words(head: nn.Module) -> int:
    return next(iter(head.parameters())).shape[0]


def _fixed(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


def _real(batch: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Which places of `hidden`, (samples, length, size), are of tokens and not of padding: (samples, length) bool."""
    for name in ("decoder_attention_mask", "attention_mask"):
        if name in batch and batch[name].shape == hidden.shape[:-1]:
            return batch[name].to(hidden.device) != 0
    return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
