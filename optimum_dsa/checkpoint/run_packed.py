"""Compressed checkpoints straight into packed layers, with no dense copy of a matrix on the way.

While transformers loads a model, a layer that will be packed waits with room for its bytes, which are taken as they
are; then it becomes a packed layer, whose parts are views of them. A transposed one (`Conv1D`) is packed anew, as it
is multiplied the other way round. Of experts see `run_packed_experts.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.fences import device_map_of
from ..packed import bitmask
from ..packed.linear import PackedLinear
from ..packed.matrix import PackedMatrix
from ..packed.pack_model import (
    LEAST_ZEROS,
    TYPES_PACKED,
    dense_reasons,
    layers_of,
    packed_layers,
    replace_layer,
)
from ..packed.tensor_cores import to_tensor_cores, with_kernels
from ..packed.whole import WholeHeader
from .encodings import Header
from .run_packed_experts import WaitingExperts, make_experts_wait, pack_waiting_experts


logger = logging.getLogger(__name__)


class Waiting(nn.Module):
    """Where a packed layer will be: room for the bytes of its matrix, as the checkpoint has them, and its bias.

    Args:
        layer (`nn.Linear | Conv1D`): the layer that the model has there, without data.
        length (`int`): bytes of the encoded matrix.
    """

    def __init__(self, layer: nn.Linear | Conv1D, length: int):
        super().__init__()
        self.transposed, self.dtype = isinstance(layer, Conv1D), layer.weight.dtype
        self.register_buffer("weight", torch.empty(length, dtype=torch.uint8, device="meta"))
        self.register_parameter("bias", layer.bias)

    def take(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The bytes of the weight, (bytes,), and in which type it is asked for, if it is another than the model's."""
        if dtype is not None and dtype.is_floating_point:
            self.dtype = dtype
        return tensor

    def packed(self, name: str) -> PackedLinear:
        """The layer; `ValueError` where its bytes are damaged."""
        matrix = PackedMatrix.from_bytes(self.weight, name, self.transposed)
        if matrix.values.is_floating_point() and matrix.values.dtype != self.dtype:
            matrix = replace(matrix, values=matrix.values.to(self.dtype))
        return PackedLinear(matrix, self.bias, self.transposed, self.dtype).train(self.training)


def make_waiting(model: nn.Module, headers: Mapping[str, Header]) -> None:
    """Have the layers of `model`, which has no data yet, wait for packed matrices, where these are to stay so.

    Args:
        headers (`Mapping[str, Header]`): of the encoded tensors in a checkpoint, by the names that they are loaded as,
            or would be without the model's prefix.
    """
    prefix = getattr(model, "base_model_prefix", "")
    reasons, layers = dense_reasons(model), dict(layers_of(model))
    for name, header in headers.items():
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        found = next((each.removesuffix(".weight") for each in names if each.removesuffix(".weight") in layers), None)
        # Of an encoding that somebody else has registered, nothing is known but what it is unpacked by.
        known = isinstance(header, (bitmask.Header, WholeHeader)) and name.endswith(".weight")
        if found is None or not known or f"{found}.weight" in reasons:
            continue
        layer = layers[found]
        fits = tuple(header.shape) == tuple(layer.weight.shape) and header.dtype in TYPES_PACKED
        if fits and 1 - header.kept / max(header.size, 1) >= LEAST_ZEROS:
            replace_layer(model, found, Waiting(layer, header.bytes))
    make_experts_wait(model, reasons)


def waiting_at(model: nn.Module | None, name: str) -> Waiting | WaitingExperts | None:
    """The module of `model` that waits for the tensor called `name`, by its last name; `None` where none does."""
    path, _, attribute = name.rpartition(".")
    try:
        found = None if model is None else model.get_submodule(path)
    except AttributeError:  # of several names, transformers gives a pattern
        return None
    waits = isinstance(found, Waiting) and attribute == "weight"
    return found if waits or (isinstance(found, WaitingExperts) and attribute in found.matrices) else None


@torch.no_grad()
def pack_waiting(model: nn.Module) -> int:
    """Make packed layers of those that waited and have their bytes now; how many."""
    waiting = [(name, module) for name, module in model.named_modules() if isinstance(module, Waiting)]
    for name, module in waiting:
        replace_layer(model, name, module.packed(f"{name}.weight"))
    pack_waiting_experts(model)
    to_tensor_cores(model, with_kernels(model))
    packed = len(packed_layers(model))
    if not packed:
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES_PACKED)
        message = "No matrix of a type that is packed (%s) has %.0f%% zeros or more: the model is dense."
        logger.warning(message, types, 100 * LEAST_ZEROS)
    return packed


def check_places(model: nn.Module) -> None:
    """Raise `ValueError` where the device map that a loaded model got, such as "auto", puts modules on a disk."""
    if "disk" in device_map_of(model).values():
        raise ValueError(
            "Packed matrices are not kept on a disk, and device_map puts modules there; load the model with "
            "quantization_config=DSAQuantizationConfig(run_packed=False), or give it more memory."
        )


def refuse_saving(model: nn.Module) -> Any:
    """Raise `ValueError`: transformers itself does not save packed matrices."""
    raise ValueError(
        f"This {type(model).__name__} is packed, which transformers' own save_pretrained cannot write; save it with "
        "DSAPruner.from_pretrained(model).save_pretrained(folder), or unpack it before."
    )
