"""Experts that are packed: matrices that a model holds in one parameter, without their zeros, below each other.

transformers computes with such a parameter through a registry of implementations (`use_experts_implementation`), whose
classes say how they hold their matrices and what is between the two products. What is here computes the same, each
vector with the packed matrix of its expert. Experts of any other class stay dense.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from ..common.fences import change_class, experts_matrices, gated, in_parallel
from .linear import PackedModule
from .matrix import PackedMatrix
from .ops import linear_experts


class PackedStack(PackedModule):
    """The packed matrices of several experts, the rows of each below those of the one before.

    Args:
        matrix (`PackedMatrix`): (experts · rows, columns).
        experts (`int`): how many.
        transposed (`bool`): whether the parameter that it stands for is (experts, columns, rows).
        dtype (`torch.dtype`): what it is unpacked as, where its values are whole numbers.
    """

    def __init__(
        self, matrix: PackedMatrix, experts: int, transposed: bool = False, dtype: torch.dtype = torch.float32
    ):
        super().__init__(matrix, transposed, dtype)
        self.experts = experts

    @classmethod
    def of(cls, weight: Tensor, transposed: bool) -> PackedStack:
        """The matrices of a parameter, (experts, rows, columns), or where `transposed` (experts, columns, rows)."""
        rows = (weight.mT if transposed else weight).flatten(0, 1)
        return cls(PackedMatrix.smallest(rows), len(weight), transposed, weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The parameter, made anew each time: what is written to it is lost."""
        dense = self.matrix.dense(self.dtype).view(self.experts, -1, self.in_features)
        return dense.mT.contiguous() if self.transposed else dense

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of `weight`."""
        rows = self.out_features // self.experts
        turned = (self.in_features, rows) if self.transposed else (rows, self.in_features)
        return self.experts, *turned

    def forward(self, input: Tensor, experts: Tensor) -> Tensor:
        """Vectors, (n, in_features), each times the matrix of its expert, (n,): (n, rows of an expert)."""
        self.check_input(input)
        scales = None if self.scales is None else self.scales.view(torch.float32)
        parts = (self.mask, self.values, self.starts, scales, self.group)
        return linear_experts(input, experts, *parts, self.out_features // self.experts)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


class PackedExperts(nn.Module):
    """What a class of experts becomes: the same module, whose matrices are packed.

    Attributes:
        parameters_before (`tuple[str, ...]`): the names of its parameters, in their order, before it was packed.
    """

    is_packed = True
    parameters_before: tuple[str, ...]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), and experts and their shares, (tokens, k) each -> (tokens, hidden)."""
        first, last = experts_matrices(self)
        chosen, k = top_k_index.flatten(), top_k_index.shape[-1]
        found = self._product(first, hidden_states.repeat_interleave(k, dim=0), chosen)
        found = gated(self, found) if self.has_gate else self.act_fn(found)
        found = self._product(last, found, chosen)
        if getattr(self, "has_post_expert_norm", False):
            found = self.post_expert_norm(found)
        found = (found * top_k_weights.flatten()[:, None]).view(len(hidden_states), k, -1)
        return found.sum(dim=1).to(hidden_states.dtype)

    def _product(self, name: str, input: Tensor, chosen: Tensor) -> Tensor:
        found = getattr(self, name)(input, chosen)
        return found + getattr(self, f"{name}_bias")[chosen] if self.has_bias else found

    def tensor(self, name: str) -> Tensor:
        """The parameter called `name` before it was packed, with its zeros."""
        value = getattr(self, name)
        return value.weight if isinstance(value, PackedStack) else value.detach()

    @property
    def names(self) -> tuple[str, ...]:
        """Of what `tensor` gives."""
        return self.parameters_before

    def shell(self) -> nn.Module:
        """The module that it was, on the device "meta": shapes and types of its parameters, and no weights."""
        shapes = {}
        for name in self.names:
            value = getattr(self, name)
            shapes[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="meta"))
        made = copy.deepcopy(self, {id(getattr(self, name)): None for name in self.names})
        _unpacked(made, shapes)
        return made

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so that a copy in another process makes it, too.
        return _blank, (_kind_before(self),), vars(self)


def stays_dense(module: nn.Module, name: str) -> str | None:
    """Why a parameter of matrices of experts in `module` cannot be packed; `None` where it can."""
    weight = getattr(module, name)
    if in_parallel(module):
        return "experts of which other processes hold others"
    if weight.dim() != 3 or weight[0].numel() % 8:
        return "experts whose masks do not begin at a byte"
    return None


@torch.no_grad()
def pack_experts(module: nn.Module) -> None:
    """Pack the matrices of a module of experts, in place, one parameter after the other."""
    before = tuple(name for name, _ in module.named_parameters(recurse=False))
    for name in experts_matrices(module):
        packed = PackedStack.of(getattr(module, name).detach(), module.is_transposed)
        delattr(module, name)
        setattr(module, name, packed)
    become_packed(module, before)


def become_packed(module: nn.Module, before: tuple[str, ...]) -> None:
    """Have a module of experts whose matrices are packed compute with them; `before`: its parameters' names."""
    module.parameters_before = before
    change_class(module, _packed_class(type(module)))


@torch.no_grad()
def unpack_experts(module: PackedExperts) -> None:
    """Give the matrices of packed experts their zeros back, in place, one after the other."""
    for name in module.names:
        if isinstance(getattr(module, name), PackedStack):
            setattr(module, name, nn.Parameter(module.tensor(name)))
    _unpacked(module, {name: getattr(module, name) for name in module.names})


def with_parameters(module: nn.Module, parts: Mapping[str, nn.Parameter | PackedStack]) -> None:
    """Give `module` these parts in their order, in place, each for that of its name."""
    for name, part in parts.items():
        delattr(module, name)
        setattr(module, name, part)


def _unpacked(module: PackedExperts, parameters: Mapping[str, nn.Parameter]) -> None:
    """Make `module` what it was, in place, with these parameters in their order."""
    with_parameters(module, parameters)
    del module.parameters_before
    change_class(module, _kind_before(module))


@cache
def _packed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Packed{kind.__name__}", (PackedExperts, kind), {"__module__": kind.__module__})


def _kind_before(module: PackedExperts) -> type[nn.Module]:
    return type(module).__mro__[2]


def _blank(kind: type[nn.Module]) -> PackedExperts:
    packed = _packed_class(kind)
    return packed.__new__(packed)
