"""Models that are packed and unpacked in memory, and what is to be done to one that runs packed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..model.adapters import has_adapters, inner_model
from ..model.inputs import own_settings_of
from ..packed.pack_model import LEAST_ZEROS, Packing, pack_model, packed_layers, seen_dense, unpack_model
from ..packed.tensor_cores import to_tensor_cores, with_kernels
from .forms import check_model


logger = logging.getLogger(__name__)


def pack(model: nn.Module, least_zeros: float = LEAST_ZEROS) -> Packing:
    """Pack the matrices of `model`, a transformers model, in place; what is packed, and in how many bytes.

    Those that lie on a GPU that there are kernels for, and are 2:4, are held as its tensor cores take them.

    Raises:
        ValueError: it has adapters, or `least_zeros` is no share.
    """
    if has_adapters(model):
        raise ValueError(
            f"This {type(model).__name__} has adapters, which are merged into weights that are there: merge them "
            "(merge) before it is packed, or pack it and put them on then (lora_on_packed)."
        )
    packing = pack_model(model, least_zeros)
    to_tensor_cores(model, with_kernels(model))
    if packing.packed and getattr(model, "hf_quantizer", None) is None:
        own_settings_of(model)
        _mark(model)
    logger.info("%s", packing)
    return packing


def unpack(model: nn.Module) -> tuple[str, ...]:
    """Give the packed matrices of `model` their zeros back, in place; names of those layers.

    Raises:
        ValueError: it has adapters on them.
    """
    if packed_layers(model) and has_adapters(model):
        raise ValueError(
            f"This {type(model).__name__} has adapters on packed layers; take them off (`model.unload()` of a PEFT "
            "model), unpack it, and put them on again."
        )
    names = unpack_model(model)
    if names:
        _unmark(model)
    return names


def is_packed(model: nn.Module) -> bool:
    """Whether `model`, or the one under its adapters, runs from packed matrices."""
    return bool(packed_layers(model))


def make_ready(model: nn.Module, purpose: str) -> None:
    """Unpack `model`, in place and with a warning, for what changes weights; `ValueError` where it is quantised."""
    check_model(model)
    if is_packed(model):
        names = unpack(inner_model(model))
        logger.warning(
            "%s needs weights with their zeros: %s packed matrices are unpacked.", purpose, f"{len(names):,}"
        )


@contextmanager
def as_dense(model: nn.Module) -> Iterator[None]:
    """A context in which a packed `model` is an ordinary one whose weights are elsewhere, as `seen_dense` has it."""
    inner = inner_model(model)
    quantizer = getattr(inner, "hf_quantizer", None) if is_packed(inner) else None
    with seen_dense(model):
        if quantizer is not None:
            _unmark(inner)
        try:
            yield
        finally:
            if quantizer is not None:
                _mark(inner, quantizer)


def _mark(model: nn.Module, quantizer: object = None) -> None:
    """Say to transformers that `model` is packed: as if it had been loaded so."""
    # After transformers' own module, which it is added to.
    from .transformers_loader import DSAQuantizationConfig, DSAQuantizer

    quantizer = quantizer or DSAQuantizer(DSAQuantizationConfig(run_packed=True))
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized = True


def _unmark(model: nn.Module) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
