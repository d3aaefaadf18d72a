"""Models without the zeros of their matrices: packed in place, matrix by matrix, unpacked, and read as if dense."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.fences import hooks_of, move_hooks, tied_names, weights_from
from .bitmask import TYPES
from .linear import PackedLinear


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
    """

    packed: tuple[str, ...]
    dense: Mapping[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_packed: int = 0

    def __str__(self) -> str:
        share = self.bytes_packed / max(self.bytes_before, 1)
        told = f"{len(self.packed):,} matrices are packed"
        told += f": {self.bytes_packed:,} bytes, {share:.1%} of dense" if self.packed else ""
        reasons: dict[str, list[str]] = {}
        for name, why in self.dense.items():
            reasons.setdefault(why, []).append(name)
        left = [f"{len(names):,} ({why}; {names[0]})" for why, names in reasons.items()]
        return "; dense stay ".join([told, ", ".join(left)] if left else [told])


@torch.no_grad()
def pack_model(model: nn.Module, least_zeros: float = LEAST_ZEROS) -> Packing:
    """Pack the matrices of `model`, in place, one after the other: no more than one is there twice.

    Packed are the weights of `nn.Linear` and `Conv1D` of which at least a share of `least_zeros` is zero, and that
    are nobody else's: a matrix that is tied stays as it is, and so do several in one parameter (experts).

    Raises:
        ValueError: a share that is none.
    """
    if not 0 <= least_zeros <= 1:
        raise ValueError(f"least_zeros={least_zeros} is a share of zeros, from 0 to 1; {LEAST_ZEROS} is the default.")
    packed, before, after = [], 0, 0
    reasons = dense_reasons(model)
    for name, layer in layers_of(model):
        why = reasons.pop(f"{name}.weight", None)
        if why is None and _zeros(layer.weight) < least_zeros:
            why = f"fewer than {least_zeros:.0%} zeros"
        if why is None:
            made = PackedLinear.of(layer)
            before, after = before + layer.weight.nbytes, after + made.matrix.nbytes
            replace_layer(model, name, made)
            packed.append(name)
        else:
            reasons[f"{name}.weight"] = why
    return Packing(tuple(packed), reasons, before, after)


@torch.no_grad()
def unpack_model(model: nn.Module) -> tuple[str, ...]:
    """Give the packed matrices of `model` their zeros back, in place, one after the other; names of those layers."""
    names = packed_layers(model)
    for name in names:
        replace_layer(model, name, model.get_submodule(name).layer())
    return names


def packed_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the packed layers in `model`."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, PackedLinear))


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
    found = {}
    layers = {f"{name}.weight": layer for name, layer in layers_of(model)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in layers and name in tied:
            found[name] = "tied"
        elif name in layers and any(hook.offload for hook in hooks_of(layers[name])):
            found[name] = "offloaded"
        elif name in layers and parameter.dtype not in TYPES_PACKED:
            found[name] = str(parameter.dtype).removeprefix("torch.")
        elif name not in layers and parameter.dim() >= 2 and parameter.is_floating_point():
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, (nn.Linear, Conv1D)) and name.endswith(".weight"):
                found[name] = f"of class {type(owner).__name__}"
            elif parameter.dim() == 3 and not type(owner).__module__.startswith("torch."):
                found[name] = "several matrices in one parameter"
    return found


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
    packed = {name: model.get_submodule(name) for name in packed_layers(model)}
    try:
        for name, layer in packed.items():
            shell = layer.shell()
            weights_from(shell, _Unpacked(layer), next(layer.buffers()).device)
            model.set_submodule(name, shell)
        yield
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)


class _Unpacked(Mapping[str, Tensor]):
    """The parameters of a packed layer by name, of any shape: unpacked when they are asked for."""

    def __init__(self, layer: PackedLinear):
        self._layer = layer
        self._names: Collection[str] = ("weight",) if layer.bias is None else ("weight", "bias")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return getattr(self._layer, name).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _zeros(weight: Tensor) -> float:
    # as the packed form counts them: -0.0 is a value
    bits = weight.detach().view({2: torch.int16, 4: torch.int32}[weight.itemsize])
    return 1 - int(bits.count_nonzero()) / max(weight.numel(), 1)
