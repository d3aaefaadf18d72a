"""Masks that hold through training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...model.sharded import local


class HeldZeros:
    """Parameters of a model whose zeros stay.

    A mask is read from its parameter (`refresh`): what is zero is held. Gradients of what is held are zero from then
    on, and `apply` puts back what an optimizer changed all the same (momentum, weight decay). Of a sharded parameter
    each process holds the mask of its share, and asks no other.

    Args:
        model (`nn.Module`): the model that is trained.
        names (`Sequence[str]`): of its parameters.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.parameters = {name: model.get_parameter(name) for name in names}
        self.keep: dict[str, Tensor] = {}
        self._handles = []
        self.refresh()
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                if local(parameter) is parameter:
                    self._handles.append(parameter.register_hook(self._masked(name)))
                else:  # autograd never sees a share: FSDP sets its gradient, and calls these
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._mask_share(name)))

    def _masked(self, name: str):
        # Looked up when it is called: `refresh` makes new masks while the hook stays.
        return lambda gradient: gradient * self.keep[name]

    def _mask_share(self, name: str):
        @torch.no_grad()
        def mask(parameter):
            local(parameter.grad).mul_(self.keep[name])

        return mask

    @torch.no_grad()
    def refresh(self) -> None:
        """Hold what is zero now."""
        self.keep = {name: local(parameter.data) != 0 for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is held to zero, in place; in half precision, move off zero what training rounded to it."""
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                share = local(parameter.data)
                share.mul_(self.keep[name])
                # In float32 a step that ends at exactly zero is chance; in half precision small weights round to it.
                if share.dtype != torch.float32:
                    keep_alive_(share, self.keep[name])

    def release(self) -> None:
        """Let gradients go as they are again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def keep_alive_(weight: Tensor, keep: Tensor) -> None:
    """Give kept weights that are exactly zero the smallest normal number, in place: zeros are the mask. Any shape."""
    lost = (weight == 0) & keep
    if lost.any():
        weight[lost] = torch.finfo(weight.dtype).tiny
