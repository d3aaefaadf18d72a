"""A linear map that multiplies with its matrix as it is packed: what takes the place of `nn.Linear` and `Conv1D`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import cuda  # noqa: F401 - registers what multiplies on a GPU
from .matrix import PackedMatrix
from .ops import linear


PARTS = ("mask", "values", "starts", "scales")  # the buffers that are the matrix


class PackedModule(nn.Module):
    """A packed matrix as a part of a model.

    Its parts are buffers: they move with the model and stand in its `state_dict`, and nothing trains them. A model
    that is cast casts the values of a floating type, and no other part.

    Args:
        matrix (`PackedMatrix`): W, (out_features, in_features).
        transposed (`bool`): whether what it stands for holds Wᵀ.
        dtype (`torch.dtype`): what W is unpacked as, where its values are whole numbers.
    """

    is_packed = True  # what walks through models asks this of every module

    def __init__(self, matrix: PackedMatrix, transposed: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.transposed = transposed
        for name in (*PARTS, "unpacked"):
            self.register_buffer(name, None, persistent=name in PARTS)
        self._hold(matrix, dtype)
        self.register_load_state_dict_pre_hook(_check_state)

    def _hold(self, matrix: PackedMatrix, dtype: torch.dtype) -> None:
        self.mask, self.values, self.starts, self.group = matrix.mask, matrix.values, matrix.starts, matrix.group
        # As whole numbers of the same bits: they stay float32, whatever a model is cast to.
        self.scales = None if matrix.scales is None else matrix.scales.view(torch.int32)
        # No element, of a type that is cast with the model, as weights are.
        self.unpacked = None if matrix.scales is None else torch.empty(0, dtype=dtype, device=matrix.values.device)

    @torch.no_grad()
    def quantise_(self, bits: int) -> None:
        """Hold whole numbers of 4 or 8 `bits`, each the nearest to what is kept, with a scale a row, in place."""
        self._hold(PackedMatrix.quantised(self.matrix.dense(), bits), self.dtype)

    @property
    def matrix(self) -> PackedMatrix:
        """W, of the same parts, which are checked once more."""
        scales = None if self.scales is None else self.scales.view(torch.float32)
        shape = (self.out_features, self.in_features)
        return PackedMatrix(self.mask, self.values, self.starts, shape, scales, self.group)

    @property
    def dtype(self) -> torch.dtype:
        """Of what it stands for."""
        return self.values.dtype if self.unpacked is None else self.unpacked.dtype

    def check_input(self, input: Tensor) -> None:
        """Raise `ValueError` for what is no (..., in_features) of a floating type: operators read without looking."""
        if not input.dim() or input.shape[-1] != self.in_features or not input.is_floating_point():
            raise ValueError(
                f"The input of a packed matrix of {self.out_features} x {self.in_features} is (..., "
                f"{self.in_features}) of a floating type, got {tuple(input.shape)} {input.dtype}."
            )

    def extra_repr(self) -> str:
        kept = self.values.numel() * (2 if self.values.dtype == torch.uint8 else 1)
        share = kept / max(self.in_features * self.out_features, 1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"values={str(self.values.dtype).removeprefix('torch.')}, kept={share:.3f}"
        )


class PackedLinear(PackedModule):
    """input · Wᵀ + bias, (..., in_features) -> (..., out_features), with W packed.

    Args:
        matrix (`PackedMatrix`): W, (out_features, in_features).
        bias (`nn.Parameter`, *optional*): (out_features,).
        transposed (`bool`): whether the layer that it stands for holds Wᵀ, as `Conv1D` does.
        dtype (`torch.dtype`): what W is unpacked as, where its values are whole numbers.
    """

    def __init__(
        self,
        matrix: PackedMatrix,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(matrix, transposed, dtype)
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear | Conv1D) -> PackedLinear:
        """What multiplies as `layer` does; its bias is shared. A weight on a grid is held as whole numbers."""
        transposed = isinstance(layer, Conv1D)
        weight = layer.weight.detach()
        matrix = PackedMatrix.smallest(weight.t() if transposed else weight)
        return cls(matrix, layer.bias, transposed, weight.dtype).train(layer.training)

    @property
    def weight(self) -> Tensor:
        """W with its zeros, made anew each time, for code that reads weights: (out_features, in_features).

        What is written to it is lost. Where `transposed`, (in_features, out_features).
        """
        dense = self.matrix.dense(self.dtype)
        return dense.t() if self.transposed else dense

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layer's parameters, which `tensor` gives."""
        return ("weight",) if self.bias is None else ("weight", "bias")

    def tensor(self, name: str) -> Tensor:
        """The layer's parameter called `name`, with its zeros."""
        return getattr(self, name).detach()

    def shell(self) -> nn.Linear | Conv1D:
        """The layer that it stands for, on the device "meta": its shape and dtype, and no weights."""
        if self.transposed:
            with torch.device("meta"):
                made = Conv1D(self.out_features, self.in_features)
        else:
            made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return made.to(self.dtype).train(self.training)

    def layer(self) -> nn.Linear | Conv1D:
        """The layer that it stands for, with its zeros; the bias is shared."""
        made = self.shell()
        made.weight, made.bias = nn.Parameter(self.weight.contiguous()), self.bias
        return made

    def taken(self, input: Tensor) -> Tensor:
        """An input that is looked at; within `torch.autocast` in its type, as a dense layer takes it."""
        self.check_input(input)
        kind = input.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return input.to(torch.get_autocast_dtype(kind)) if autocast else input

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the input's dtype, or autocast's."""
        input = self.taken(input)
        scales = None if self.scales is None else self.scales.view(torch.float32)
        output = linear(input, self.mask, self.values, self.starts, scales, self.group)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"


def _check_state(layer: PackedModule, state: dict[str, Tensor], prefix: str, *others) -> None:
    """Hold the parts in a state dict against each other before one is taken: operators read without looking.

    A matrix of the same shape may keep other weights, and more or fewer of them.
    """
    parts = {name: state[prefix + name] for name in PARTS if prefix + name in state}
    if not parts:
        return
    expected, where = {name for name in PARTS if getattr(layer, name) is not None}, prefix.removesuffix(".") or "layer"
    if parts.keys() != expected:
        raise ValueError(
            f"A state dict has {', '.join(sorted(parts))} of the packed {where}, which has "
            f"{', '.join(sorted(expected))}: a packed matrix is all of its parts; load those of the same model."
        )
    if not any(part.is_meta for part in parts.values()):
        scales = parts["scales"].view(torch.float32) if "scales" in parts else None
        shape = (layer.out_features, layer.in_features)
        try:
            PackedMatrix(parts["mask"], parts["values"], parts["starts"], shape, scales, layer.group)
        except ValueError as error:
            raise ValueError(f"A state dict does not fit the packed {where}. {error}") from None
    # Numbers of 8 bits and pairs of 4 have scales of one shape.
    if parts["values"].dtype != layer.values.dtype and not layer.values.is_floating_point():
        raise ValueError(
            f"The packed {where} holds {layer.values.dtype}, and the state dict {parts['values'].dtype}; pack the "
            "model as the other one is."
        )
    if parts["values"].shape != layer.values.shape:
        layer.values = layer.values.new_empty(parts["values"].shape)
