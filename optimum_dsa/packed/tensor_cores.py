"""Packed layers of which two of four weights stay, in the order in which a GPU's tensor cores take them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from .cuda import kernels
from .linear import PackedLinear
from .matrix import PackedMatrix
from .pack_model import packed_layers, replace_layer
from .two_of_four import TwoOfFour, has_form


class TensorCoreLinear(PackedLinear):
    """A packed layer whose matrix is held as a tensor core takes it, and as nothing else.

    It is read, unpacked and saved as the packed layer that it was made of; only its `state_dict` has other parts:
    `groups`, (tiles, groups, bytes) uint8, and of 8 bits `row_scales`, (out_features, 1), the bits of float32.
    """

    def __init__(self, layer: PackedLinear):
        nn.Module.__init__(self)
        made = TwoOfFour.of(layer.matrix)
        self.out_features, self.in_features = made.shape
        self.group, self.full, self.transposed = made.group, made.full, layer.transposed
        self.register_buffer("groups", made.groups)
        # As whole numbers of the same bits: they stay float32, whatever a model is cast to.
        self.register_buffer("row_scales", None if made.scales is None else made.scales.view(torch.int32))
        self.register_buffer("unpacked", layer.unpacked, persistent=False)
        self.register_parameter("bias", layer.bias)
        self.train(layer.training)

    @property
    def two_of_four(self) -> TwoOfFour:
        """W, of the same parts."""
        scales = None if self.row_scales is None else self.row_scales.view(torch.float32)
        return TwoOfFour(self.groups, (self.out_features, self.in_features), scales, self.group, self.full)

    @property
    def matrix(self) -> PackedMatrix:
        """W as mask and values, made anew each time."""
        return self.two_of_four.matrix()

    @property
    def dtype(self) -> torch.dtype:
        """Of `weight`."""
        return torch.bfloat16 if self.unpacked is None else self.unpacked.dtype

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the input's dtype."""
        output = self.two_of_four.linear(self.taken(input))
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def get_extra_state(self) -> Tensor:
        """Whether two of each four are kept, so that a zero may be one: in a state dict it stands beside the parts."""
        return torch.tensor(self.full)

    def set_extra_state(self, state: Tensor) -> None:
        self.full = bool(state)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"2:4, bits={self.two_of_four.bits}"
        )


@torch.no_grad()
def to_tensor_cores(model: nn.Module, layers: Collection[str] | None = None) -> tuple[str, ...]:
    """Hold packed 2:4 matrices of `model` as tensor cores take them, in place, one after the other; their names.

    Those of another pattern or type stay as they are ([`~packed.two_of_four.has_form`]). A CPU multiplies with them
    too, and slower than before: it unpacks them.

    Args:
        layers (`Collection[str]`, *optional*): names of packed layers that it is done for; by default all.
    """
    names = []
    for name in packed_layers(model) if layers is None else layers:
        layer = model.get_submodule(name)
        if type(layer) is PackedLinear and has_form(layer.matrix):
            replace_layer(model, name, TensorCoreLinear(layer))
            names.append(name)
    return tuple(names)


def with_kernels(model: nn.Module) -> tuple[str, ...]:
    """Names of the packed layers that are on a GPU whose tensor cores there are kernels for."""
    names = packed_layers(model)
    return tuple(name for name in names if kernels(next(model.get_submodule(name).buffers()).device) is not None)


@torch.no_grad()
def from_tensor_cores(model: nn.Module) -> tuple[str, ...]:
    """Hold them as masks and values again, in place, one after the other; their names."""
    names = tuple(name for name, layer in model.named_modules() if isinstance(layer, TensorCoreLinear))
    for name in names:
        layer = model.get_submodule(name)
        made = PackedLinear(layer.matrix, layer.bias, layer.transposed, layer.dtype)
        replace_layer(model, name, made.train(layer.training))
    return names
