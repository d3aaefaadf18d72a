"""What the model's loss loses to first and second order with each weight that structures own: one pass, before a walk.

Every gradient is multiplied by its weight as soon as it is there, summed, and dropped: those of all weights are never
held together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...common.progress import progress
from ...model.gradients import Receiver, check_has_loss, loss_of, not_finite, only_gradients_of
from ...model.inputs import kind_of
from .structure import Cut, Structures


@dataclass(frozen=True)
class Products:
    """p = w · ∂L/∂w over what structures own of one matrix, by row or column that is theirs: (structures, size) each.

    L is the mean of the samples' losses L_j, and p_j is w · ∂L_j/∂w: the Fisher information stands in for the Hessian.

    Attributes:
        first: Σ p over the row.
        first_squared: the mean over samples of (Σ p_j)².
        second: Σ over the row of the mean of p_j².
        elements (*optional*): Σ |p|.
        mixed (*optional*): Σ |p − ½ · the mean of p_j²|.
    """

    first: Tensor
    first_squared: Tensor
    second: Tensor
    elements: Tensor | None = None
    mixed: Tensor | None = None


class _Sums:
    """Sums over samples of p_j, float32, for one matrix; by element only where that is needed."""

    def __init__(self, parameter: Tensor, axes: set[int], needed: str):
        self._axes, self._needed, self._samples = sorted(axes), needed, 0
        self._vectors = {axis: torch.zeros(3, parameter.shape[axis], device=parameter.device) for axis in axes}
        number = {"vectors": 0, "elements": 1, "mixed": 2}[needed]
        self._elements = [torch.zeros_like(parameter, dtype=torch.float32) for _ in range(number)]

    def add_(self, products: Tensor) -> None:
        """Count a sample's p_j, of the matrix's shape, which is written to."""
        self._samples += 1
        sums = [_along(products, axis) for axis in self._axes]
        if self._elements:
            self._elements[0] += products
        products.square_()
        for axis, first in zip(self._axes, sums):
            self._vectors[axis] += torch.stack([first, first.square(), _along(products, axis)])
        if len(self._elements) > 1:
            self._elements[1] += products

    def of(self, cut: Cut, samples: int) -> Products:
        index = cut.index.to(self._vectors[cut.axis].device)
        found = [sums[index] / samples for sums in self._vectors[cut.axis]]
        if self._elements:
            mean = self._elements[0] / samples
            found.append(_along(mean.abs(), cut.axis)[index])
        if len(self._elements) > 1:
            found.append(_along(mean.sub_(self._elements[1] / (2 * samples)).abs_(), cut.axis)[index])
        return Products(*found)


def _along(tensor: Tensor, axis: int) -> Tensor:
    """The sum over all axes but one."""
    return tensor.sum([other for other in range(tensor.dim()) if other != axis])


def collect_products(
    model: nn.Module,
    units: Mapping[str, Structures],
    batches: Sequence[Mapping[str, Tensor]],
    needed: str,
    blockwise: bool = False,
) -> dict[str, list[Products]]:
    """Unit -> of every matrix that its structures own a part of, what a loss of them would do.

    Args:
        batches (`Sequence[Mapping[str, Tensor]]`): a sample each, inputs of the model by name, (1, length, ...). The
            loss is that of every next token, for a masked model of the tokens that it is given.
        needed (`str`): "vectors", "elements" (and `Products.elements`) or "mixed" (and `Products.mixed`). The latter
            two hold one and two float32 numbers for each weight.
        blockwise (`bool`, defaults to `False`): a pass for every block: the same numbers in the memory of one block's.

    Raises:
        ValueError: the model predicts no tokens, or a gradient holds NaN or infinities; it names the weight.
    """
    check_has_loss(model, "an importance")
    kind = kind_of(model)
    blocks: dict[str, list[Structures]] = {}
    for each in units.values():
        blocks.setdefault(each.block if blockwise else "", []).append(each)
    found: dict[str, list[Products]] = {}
    for together in progress(list(blocks.values()), "Gradients", "block", "optimum_dsa.prune"):
        found |= _collect(model, together, batches, needed, kind)
    return {unit: found[unit] for unit in units}


def _collect(
    model: nn.Module,
    units: Sequence[Structures],
    batches: Sequence[Mapping[str, Tensor]],
    needed: str,
    kind: str,
) -> dict[str, list[Products]]:
    axes: dict[str, set[int]] = {}
    for each in units:
        for cut in _matrices(model, each):
            axes.setdefault(cut.tensor, set()).add(cut.axis)
    sums = {name: _Sums(model.get_parameter(name), own, needed) for name, own in axes.items()}
    with only_gradients_of(model, {model.get_parameter(name): _fold(name, own) for name, own in sums.items()}):
        for batch in batches:
            with torch.inference_mode(False), torch.enable_grad():
                loss_of(model, batch, kind).backward()
    return {each.unit: [sums[cut.tensor].of(cut, len(batches)) for cut in _matrices(model, each)] for each in units}


def _fold(name: str, sums: _Sums) -> Receiver:
    """What adds weights times gradients of the parameter `name` to its sums."""

    def fold(parameter: nn.Parameter, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            raise not_finite(name, "an importance")
        sums.add_(parameter.detach().float() * gradient.float())

    return fold


def _matrices(model: nn.Module, structures: Structures) -> list[Cut]:
    """Cuts of matrices; biases are few, and no importance counts them."""
    return [cut for cut in structures.cuts if model.get_parameter(cut.tensor).dim() > 1]
