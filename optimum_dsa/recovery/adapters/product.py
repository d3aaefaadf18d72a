"""x · (W + ΔW)ᵀ, with ΔW made anew in the backward pass: no matrix of W's size outlives the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Part:
    """One adapter's share: a `Mode`'s delta, its factors and its scaling."""

    delta: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    a: Tensor
    b: Tensor
    scaling: float


def changed_weight(weight: Tensor, parts: Sequence[Part], whole: bool = True) -> Tensor:
    """W + Σ ΔW, or with `whole=False` the sum alone; (out_features, in_features), the wider dtype, differentiable."""
    total = sum(part.delta(weight, part.a, part.b, part.scaling) for part in parts)
    return total + weight if whole else total


def sparse_linear(x: Tensor, weight: Tensor, parts: Sequence[Part], whole: bool = True) -> Tensor:
    """x · (W + Σ ΔW)ᵀ, or with `whole=False` x · (Σ ΔW)ᵀ.

    Saved for the backward pass are x, the weight and the factors, which all exist anyway. Forward and backward make
    the sum once each, in the dtype of the factors, and multiply in the dtype of x (autocast's, where it is on).

    Args:
        x (`Tensor`): (..., in_features).
        weight (`Tensor`): (out_features, in_features).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    recipe = tuple((part.delta, part.scaling) for part in parts), whole
    factors = [factor for part in parts for factor in (part.a, part.b)]
    # The sum is made in the dtype of the factors: autocast would round b · a before it is added.
    with torch.autocast(x.device.type, enabled=False):
        return _SparseLinear.apply(x, weight, recipe, *factors)


def _changed(weight: Tensor, recipe, factors: Sequence[Tensor]) -> Tensor:
    """`changed_weight` from a recipe and factors, a and b in turn: (out_features, in_features)."""
    operations, whole = recipe
    pairs = zip(operations, factors[::2], factors[1::2])
    return changed_weight(weight, [Part(delta, a, b, scaling) for (delta, scaling), a, b in pairs], whole)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, recipe, *factors):
        ctx.recipe = recipe
        ctx.save_for_backward(x, weight, *factors)
        return x @ _changed(weight, recipe, factors).to(x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, *factors = ctx.saved_tensors
        needs_x, needs_weight, _, *needs = ctx.needs_input_grad
        # The delta is made once more and differentiated by autograd: a new mode needs no backward of its own.
        leaves = [tensor.detach().requires_grad_() for tensor in (weight, *factors)]
        wanted = [leaf for leaf, need in zip(leaves, (needs_weight, *needs)) if need]
        with torch.enable_grad():
            changed = _changed(leaves[0] if needs_weight else weight.detach(), ctx.recipe, leaves[1:])
        for_x = gradient @ changed.detach().to(gradient.dtype) if needs_x else None
        found = iter(())
        if wanted:
            # Dense, also where the weight is zero; the mode's own derivative is zero there.
            of_changed = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
            found = iter(torch.autograd.grad(changed, wanted, of_changed.to(changed.dtype)))
        for_weight = next(found) if needs_weight else None
        return for_x, for_weight, None, *(next(found) if need else None for need in needs)
