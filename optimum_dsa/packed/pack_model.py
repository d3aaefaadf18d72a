"""Models without the zeros of their matrices: packed in place, matrix by matrix, unpacked, and read as if dense."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.fences import experts_matrices, hooks_of, move_hooks, tied_names, weights_from
from .bitmask import TYPES
from .experts import PackedExperts, pack_experts, stays_dense, unpack_experts
from .linear import PackedLinear, PackedModule


_NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # that a user would ask for
LEAST_ZEROS = 0.25  # share of zeros: with fewer, expanding costs more than reading saves
TYPES_PACKED = tuple(dtype for dtype in TYPES if dtype is not torch.float64)


@dataclass(frozen=True)
class Packing:
    """What `pack_model` did.

    Attributes:
        packed (`tuple[str, ...]`): names of the layers that are packed.
        dense (`Mapping[str, str]`): names of the weights that have two dimensions or more and stay dense -> why.
        bytes_before (`int`): of the packed matrices, with their zeros.
        bytes_packed (`int`): without.
        shares (`Mapping[str, float]`): which part of the model's weights each of `dense` is.
    """

    packed: tuple[str, ...]
    dense: Mapping[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_packed: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        share = self.bytes_packed / max(self.bytes_before, 1)
        told = f"{len(self.packed):,} matrices are packed"
        told += f": {self.bytes_packed:,} bytes, {share:.1%} of dense" if self.packed else ""
        reasons: dict[str, list[str]] = {}
        for name, why in self.dense.items():
            reasons.setdefault(why, []).append(name)
        left = [
            f"{len(names):,} ({why}; {names[0]}; {sum(self.shares.get(name, 0) for name in names):.1%} of all weights)"
            for why, names in reasons.items()
        ]
        return "; dense stay ".join([told, ", ".join(left)] if left else [told])


@torch.no_grad()
def pack_model(model: nn.Module, least_zeros: float = LEAST_ZEROS) -> Packing:
    """Pack the matrices of `model`, in place, one after the other: no more than one is there twice.

    Packed are the weights of `nn.Linear`, of `Conv1D` and of experts that transformers keeps in one parameter, of
    which at least a share of `least_zeros` is zero, and that are nobody else's: a tied matrix stays as it is.

    Raises:
        ValueError: a share that is none.
    """
    if isinstance(least_zeros, bool) or not isinstance(least_zeros, (int, float)) or not 0 <= least_zeros <= 1:
        raise ValueError(
            f"least_zeros={least_zeros!r} is a share of zeros, from 0 to 1; {LEAST_ZEROS} is the default."
        )
    already = packed_layers(model)
    reasons, sizes, before, after = dense_reasons(model), _sizes(model), 0, 0
    total = sum(parameter.numel() for parameter in model.parameters())  # of tied ones once
    total += sum(
        module.out_features * module.in_features for module in model.modules() if isinstance(module, PackedModule)
    )
    for name, layer in layers_of(model):
        weight = f"{name}.weight"
        if weight not in reasons and _zeros([layer.weight]) < least_zeros:
            reasons[weight] = f"fewer than {least_zeros:.0%} zeros"
        if weight not in reasons:
            made = PackedLinear.of(layer)
            before, after = before + layer.weight.nbytes, after + made.matrix.nbytes
            replace_layer(model, name, made)
    of_experts = pack_all_experts(model, least_zeros, reasons)
    before, after = before + of_experts[0], after + of_experts[1]
    shares = {name: sizes[name] / max(total, 1) for name in reasons}
    packed = tuple(name for name in packed_layers(model) if name not in already)
    return Packing(packed, reasons, before, after, shares)


@torch.no_grad()
def pack_all_experts(model: nn.Module, least_zeros: float, reasons: dict[str, str]) -> tuple[int, int]:
    """Pack experts that have enough zeros, in place, one module after the other; their bytes before and after.

    Args:
        reasons: weights that stay dense -> why, to which is added what has too few.
    """
    before = after = 0
    for name, module in experts_of(model):
        # Both matrices of an expert are multiplied with in one way.
        parts = {f"{name}.{part}": getattr(module, part) for part in experts_matrices(module)}
        why = next((reasons[part] for part in parts if part in reasons), None)
        if why is None and _zeros(parts.values()) < least_zeros:
            why = f"fewer than {least_zeros:.0%} zeros"
        if why is not None:
            reasons |= dict.fromkeys(parts, why)
            continue
        before, names = before + sum(part.nbytes for part in parts.values()), tuple(parts)
        del parts  # each is given up as soon as it is packed
        pack_experts(module)
        after += sum(model.get_submodule(part).matrix.nbytes for part in names)
    return before, after


@torch.no_grad()
def unpack_model(model: nn.Module) -> tuple[str, ...]:
    """Give the packed matrices of `model` their zeros back, in place, one after the other; names of those layers."""
    names = packed_layers(model)
    for name, module in packed_modules(model).items():
        if isinstance(module, PackedExperts):
            unpack_experts(module)
        else:
            replace_layer(model, name, module.layer())
    return names


def packed_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the packed layers in `model`; of experts, of each parameter that holds the matrices of all."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, PackedModule))


def packed_modules(model: nn.Module) -> dict[str, PackedLinear | PackedExperts]:
    """Name -> module of each packed layer, and of each module of packed experts, as one."""
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, (PackedLinear, PackedExperts))}


def experts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each that holds the matrices of experts and can be packed by its kind."""
    found = model.named_modules()
    return [
        (name, module) for name, module in found if experts_matrices(module) and not isinstance(module, PackedExperts)
    ]


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each layer that can be packed by its kind: a class that extends one may compute another."""
    return [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]


def dense_reasons(model: nn.Module) -> dict[str, str]:
    """Names of weights that stay dense, whatever their zeros -> why. Embeddings and convolutions are not told."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    ties = tied_names(model)
    tied = {*ties, *ties.values(), *(name for group in names.values() if len(group) > 1 for name in group)}
    layers, found = {f"{name}.weight" for name, _ in layers_of(model)}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if name in layers or attribute in experts_matrices(owner):
            why = _why_dense(name, owner, parameter, tied)
            why = why or (None if name in layers else stays_dense(owner, attribute))
            found |= {name: why} if why else {}
        elif parameter.dim() >= 2 and parameter.is_floating_point() and not experts_matrices(owner):
            if isinstance(owner, (nn.Linear, Conv1D)) and attribute == "weight":
                found[name] = f"of class {type(owner).__name__}"
            elif parameter.dim() <= 3 and not isinstance(owner, _NO_MATRICES):
                found[name] = (
                    f"in a {type(owner).__name__}, which is no linear layer and none of experts that is known"
                )
    return found


def _why_dense(name: str, owner: nn.Module, parameter: Tensor, tied: Collection[str]) -> str | None:
    if name in tied:
        return "tied"
    if any(hook.offload for hook in hooks_of(owner)):
        return "offloaded"
    return None if parameter.dtype in TYPES_PACKED else str(parameter.dtype).removeprefix("torch.")


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the one at `name`, with the hooks of accelerate that were on that."""
    move_hooks(model.get_submodule(name), layer)
    model.set_submodule(name, layer)


@contextmanager
def seen_dense(model: nn.Module) -> Iterator[None]:
    """A context in which `model` is one whose weights are elsewhere: packed matrices come from their packed form.

    So whatever reads the weights of an offloaded model reads those of a packed one, one layer dense at a time. What
    is written to them is lost, and the model is not run.
    """
    packed = packed_modules(model)
    try:
        for name, module in packed.items():
            shell = module.shell()
            weights_from(shell, _Unpacked(module), next(module.buffers()).device)
            model.set_submodule(name, shell)
        yield
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)


class _Unpacked(Mapping[str, Tensor]):
    """The parameters of a packed module by name, of any shape: unpacked when they are asked for."""

    def __init__(self, module: PackedLinear | PackedExperts):
        self._module = module

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._module.names:
            raise KeyError(name)
        return self._module.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._module.names)

    def __len__(self) -> int:
        return len(self._module.names)


def _sizes(model: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters(remove_duplicate=False)}


def _zeros(weights: Iterable[Tensor]) -> float:
    """Their share among all that `weights`, of any shape, hold, as the packed form counts them: -0.0 is a value."""
    bits = [weight.detach().view({2: torch.int16, 4: torch.int32}[weight.itemsize]) for weight in weights]
    return 1 - sum(int(each.count_nonzero()) for each in bits) / max(sum(each.numel() for each in bits), 1)
