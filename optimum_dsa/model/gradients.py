"""Gradients of single weights: of the dense model's loss, before a walk, and of what one block gives, during it.

Every gradient is squared and added to its weight's sum as soon as it is there, and dropped: those of all weights are
never held together. What is held is the sums, one float32 number a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..common.progress import progress
from .adapters import inner_model
from .architecture import Architecture, Block, UnprunableError, Weight
from .calls import feed
from .examples import IGNORED, PREDICTS, logits_of
from .inputs import KINDS, kind_of
from .offload import is_offloaded
from .padding import is_whole
from .statistics import LayerStatistics


Receiver = Callable[[nn.Parameter, Tensor], None]  # is given a parameter and its gradient, of one shape


def collect_gradients(
    model: nn.Module, architecture: Architecture, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Weight -> √ of the sum over samples of its squared gradient, (out_features, in_features) float32.

    The loss of a sample is the mean over its next tokens, for a masked model over those that it is given. One backward
    pass of the whole model a sample, so that the batch size changes nothing. Memory: 4 bytes for each prunable weight,
    all at once, for they are of the model before its first block is pruned; and what one sample's backward pass holds.

    Args:
        batches (`Sequence[Mapping[str, Tensor]]`): inputs of the model by name, (samples, length, ...).

    Raises:
        ValueError: the model predicts no tokens, some of its weights are elsewhere, or a gradient is not finite.
    """
    check_has_loss(model, "a metric")
    if is_offloaded(model):
        raise ValueError(
            "Gradients of the model's loss need all of its weights at once, and some are elsewhere (offloaded); load "
            "it without offloading, or choose a metric that reads none, such as 'wanda', or 'wanda++', which reads "
            "those of one block."
        )
    kind = kind_of(model)
    sums = _Squares(architecture.weights, model)
    with only_gradients_of(model, sums.receivers):
        for sample in progress(one_by_one(batches), "Gradients", "sample", "optimum_dsa.prune"):
            with torch.inference_mode(False), torch.enable_grad():
                loss_of(model, sample, kind).backward()
    return sums.norms()


def regional_gradients(model: nn.Module, block: Block, outputs: Callable[[], Iterator[Tensor]]) -> dict[str, Tensor]:
    """As `collect_gradients` for the weights of a block, of the norm ‖f(X)‖₂ of what it gives for each sample.

    Args:
        outputs (`Callable[[], Iterator[Tensor]]`): runs the block sample by sample: (1, ..., hidden size) each.

    Yang et al., 2025, Wanda++, https://arxiv.org/abs/2503.04992, section 4.1.
    """
    sums = _Squares(block.weights, model)
    alone = only_gradients_of(model.get_submodule(block.name), sums.receivers)
    with alone, torch.inference_mode(False), torch.enable_grad():
        for output in outputs():
            output.float().norm().backward()
    return sums.norms()


@dataclass(frozen=True)
class Gradients:
    """What a walk adds to the statistics of its weights.

    Attributes:
        whole: weight -> what [`collect_gradients`] gives, (out_features, in_features); empty where nobody reads it.
        regional: whether those of every block's own output are read.
    """

    whole: Mapping[str, Tensor] = field(default_factory=dict)
    regional: bool = False

    def of_block(
        self, model: nn.Module, block: Block, outputs: Callable[[], Iterator[Tensor]]
    ) -> Mapping[str, Tensor]:
        """[`regional_gradients`] of the block's weights, where they are read."""
        return regional_gradients(model, block, outputs) if self.regional else {}

    def beside(
        self, statistics: dict[str, LayerStatistics], regional: Mapping[str, Tensor] | None = None
    ) -> dict[str, LayerStatistics]:
        """The statistics of weights, by name, with their gradients."""
        read = {"gradients": self.whole, "regional": regional or {}}
        if not any(read.values()):
            return statistics
        return {
            name: found.of_weight({kind: values[name] for kind, values in read.items() if name in values})
            for name, found in statistics.items()
        }


def check_has_loss(model: nn.Module, what: str) -> None:
    """Raise `ValueError` where the model predicts no tokens: `what` ("a metric") should read no gradients then."""
    if (kind := kind_of(model)) not in PREDICTS:
        raise ValueError(
            f"{type(inner_model(model)).__name__} {KINDS[kind]}, so there is no loss to take gradients of; choose "
            f"{what} that reads none."
        )


def one_by_one(batches: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """A sample each, (1, length, ...) by name; a batch that is run as it is (pictures beside prompts) is one."""
    found: list[Mapping[str, Tensor]] = []
    for batch in batches:
        if is_whole(batch):
            found.append(batch)
            continue
        parts = {name: value.split(1) for name, value in batch.items()}
        found += [dict(zip(parts, values)) for values in zip(*parts.values())]
    return found


class _Squares:
    """Σ over samples of the squared gradient of every parameter that holds some `weights`, of its shape, float32."""

    def __init__(self, weights: Sequence[Weight], model: nn.Module):
        self._weights = list(weights)
        self._parameters = {weight.name: weight.parameter(model) for weight in weights}
        self._sums: dict[nn.Parameter, Tensor] = {}
        names = {self._parameters[weight.name]: weight.name for weight in weights}
        self.receivers: dict[nn.Parameter, Receiver] = {
            parameter: self._add(name) for parameter, name in names.items()
        }

    def _add(self, name: str) -> Receiver:
        def add(parameter: nn.Parameter, gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                raise not_finite(name, "a metric")
            if parameter not in self._sums:
                self._sums[parameter] = torch.zeros_like(gradient, dtype=torch.float32)
            gradient = gradient.float()
            self._sums[parameter].addcmul_(gradient, gradient)

        return add

    def norms(self) -> dict[str, Tensor]:
        """Weight -> the roots, (out_features, in_features); zeros for one that no sample came to (an expert)."""
        roots = {parameter: total.sqrt_() for parameter, total in self._sums.items()}
        found = {}
        for weight in self._weights:
            parameter = self._parameters[weight.name]
            if parameter not in roots:
                roots[parameter] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            found[weight.name] = weight.matrix(roots[parameter])
        return found


def not_finite(name: str, what: str) -> ValueError:
    """What to raise for a gradient of the parameter `name` that `what` ("a metric") reads."""
    return ValueError(
        f"The gradient of {name} holds NaN or infinities; try another dtype (bfloat16 or float32), other text, or "
        f"{what} that reads no gradients."
    )


@contextmanager
def only_gradients_of(module: nn.Module, receivers: Mapping[nn.Parameter, Receiver]) -> Iterator[None]:
    """Of all parameters of `module` these alone have gradients, each of which is given to its receiver and dropped."""

    def handed(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        receivers[parameter](parameter, gradient)

    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    training = [part for part in module.modules() if part.training]
    handles = []
    try:
        module.eval()
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in receivers:
            handles.append(parameter.requires_grad_(True).register_post_accumulate_grad_hook(handed))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for part in training:
            part.training = True


def check_gradients_can_be_had(
    model: nn.Module, architecture: Architecture, reads: frozenset[str] | set[str], runs: bool, alone: bool = True
) -> None:
    """Raise where a walk could not collect the gradients that are among what it `reads`; `runs`: it has batches."""
    if not {"gradients", "regional"} & set(reads):
        return
    if not alone:
        raise ValueError("Gradients of weights are not summed over processes; prune in one, or by another metric.")
    if not runs:
        raise ValueError(
            "Gradients are taken of a model that runs on text, and these statistics are there already; give text, or "
            "choose a metric that reads none."
        )
    if "regional" in reads and architecture.head is not None:
        names = ", ".join(weight.name for weight in architecture.head.weights)
        raise UnprunableError(
            f"{names}: gradients of what a block gives do not reach weights outside the blocks; leave them dense, or "
            "choose another metric."
        )


def loss_of(model: nn.Module, batch: Mapping[str, Tensor], kind: str) -> Tensor:
    """The mean negative log-likelihood of a batch's tokens, (), inputs by name being (samples, length, ...).

    A `kind` of model that sees all tokens at once predicts those that it is given; others every next one.
    """
    writes = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    if writes not in batch:
        raise ValueError(f"A loss is of tokens, and the calibration inputs are {', '.join(batch)}; give input_ids.")
    logits = logits_of(feed(model, batch))
    labels = batch[writes].to(logits.device)
    mask = batch.get(writes.replace("input_ids", "attention_mask"))
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask.to(labels.device) == 0, IGNORED)
    if kind != "masked":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
