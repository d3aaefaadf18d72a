"""Experts of a checkpoint into packed ones: what is put together of several tensors is dense one parameter at a time.

Most checkpoints have the matrices of an expert as tensors of their own, which transformers puts together while it
loads them. Each parameter is packed as soon as it is, and waits as bytes; one that is stored whole waits as the bytes
of the file. What waits is no module of experts to transformers, which would give it new weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..common.fences import experts_matrices
from ..packed.experts import PackedStack, become_packed, with_parameters
from ..packed.matrix import PackedMatrix
from ..packed.pack_model import LEAST_ZEROS, experts_of, replace_layer


class WaitingExperts(nn.Module):
    """Where packed experts will be: room for the bytes of their matrices, and all else that the module has.

    Args:
        module (`nn.Module`): of experts, without data.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.kept = (module,)  # in a tuple, so that it is no part of this one
        self.before = tuple(name for name, _ in module.named_parameters(recurse=False))
        self.matrices = experts_matrices(module)
        self.shapes = {name: tuple(getattr(module, name).shape) for name in self.matrices}
        self.dtypes = {name: getattr(module, name).dtype for name in self.matrices}
        for name in self.before:
            if name in self.matrices:
                self.register_buffer(name, getattr(module, name).detach())
            else:
                self.register_parameter(name, getattr(module, name))
        for name, child in module.named_children():
            self.add_module(name, child)

    def take(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """One of the matrices, called `name`: its bytes, (bytes,), or as it is; and in which type it is asked for."""
        attribute = name.rpartition(".")[2]
        if dtype is not None and dtype.is_floating_point:
            self.dtypes[attribute] = dtype
        # transformers holds what comes against what is there
        setattr(self, attribute, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        return tensor

    def experts(self, name: str) -> nn.Module:
        """The module, packed, or with its zeros where it has too few; `ValueError` where bytes are damaged."""
        (module,), stacks = self.kept, {}
        for attribute in self.matrices:
            value = getattr(self, attribute)
            if value.dtype != torch.uint8:
                continue
            matrix = PackedMatrix.from_bytes(value, f"{name}.{attribute}", module.is_transposed)
            dtype, shape = self.dtypes[attribute], self.shapes[attribute]
            turned = (shape[0], shape[2], shape[1]) if module.is_transposed else shape
            if matrix.shape != (turned[0] * turned[1], turned[2]):
                raise ValueError(f"{name}.{attribute} is {matrix.shape}, and the model has {shape} there.")
            if matrix.scales is None and matrix.values.dtype != dtype:
                matrix = replace(matrix, values=matrix.values.to(dtype))
            stacks[attribute] = PackedStack(matrix, shape[0], module.is_transposed, dtype)
        size = sum(stack.out_features * stack.in_features for stack in stacks.values())
        kept = sum(int(stack.starts[-1]) for stack in stacks.values())
        packs = len(stacks) == len(self.matrices) and 1 - kept / max(size, 1) >= LEAST_ZEROS
        found = {}
        for attribute in self.before:
            value = stacks.get(attribute, getattr(self, attribute))
            if attribute in self.matrices and not packs:
                value = nn.Parameter(value.weight if isinstance(value, PackedStack) else value)
            found[attribute] = value
        with_parameters(module, found)
        if packs:
            become_packed(module, self.before)
        return module.train(self.training)


def make_experts_wait(model: nn.Module, reasons: Mapping[str, str]) -> None:
    """Have the experts of `model`, which has no data yet, wait for packed matrices, but for those with `reasons`."""
    for name, module in experts_of(model):
        if not any(f"{name}.{part}" in reasons for part in experts_matrices(module)):
            replace_layer(model, name, WaitingExperts(module))


def pack_waiting_experts(model: nn.Module) -> None:
    """Make packed experts of those that waited."""
    waiting = [(name, module) for name, module in model.named_modules() if isinstance(module, WaitingExperts)]
    for name, module in waiting:
        replace_layer(model, name, module.experts(name))
