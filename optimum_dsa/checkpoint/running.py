"""How the matrices of a checkpoint are held while the model computes, whatever they are stored as: a row per form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..common.registry import Registry
from ..packed.pack_model import LEAST_ZEROS, packed_layers
from ..packed.tensor_cores import from_tensor_cores, to_tensor_cores, with_kernels
from .encodings import encoding_in
from .forms import located
from .load import load_model, stated_in
from .packing import is_packed, pack, unpack


FORMS = Registry("form")


def load_as(path: str, form: str, **options: Any) -> nn.Module:
    """The model at a path or Hub id, its matrices in a row of `FORMS`, for inference.

    Raises:
        ValueError: it has no matrix that can be held so; and what keeps it from being loaded.
    """
    return FORMS[form](path, **options)


@FORMS.register()
def dense(path: str, **options: Any) -> nn.Module:
    """With all zeros."""
    model = load_model(path, **options)
    if is_packed(model):
        unpack(model)
    return model


@FORMS.register()
def packed(path: str, **options: Any) -> nn.Module:
    """Without the zeros of matrices that have enough of them: straight from files that leave them out."""
    with warnings.catch_warnings():
        # That what is given here decides, and not what is stored, is what is meant.
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model = load_model(path, **options, **packed_options(path, options))
    if not is_packed(model):
        pack(model)
    if not packed_layers(model):
        raise ValueError(
            f"{path} has no matrix that can be packed: of one that is nobody else's, {LEAST_ZEROS:.0%} are zeros."
        )
    return model


@FORMS.register("packed-int8")
def packed_int8(path: str, **options: Any) -> nn.Module:
    """As packed, with what is kept as numbers of 8 bits, each the nearest: smaller, and outputs differ a little.

    What is whole numbers already stays as it is.
    """
    model = packed(path, **options)
    from_tensor_cores(model)
    for name in packed_layers(model):
        if model.get_submodule(name).values.is_floating_point():
            model.get_submodule(name).quantise_(bits=8)
    to_tensor_cores(model, with_kernels(model))
    return model.eval()


def packed_options(path: str, options: dict[str, Any], run_packed: bool = True) -> dict[str, Any]:
    """What has transformers keep the matrices of a compressed checkpoint packed, or not; of another, nothing."""
    # After transformers' own module, which it is added to.
    from .transformers_loader import DSAQuantizationConfig

    path, given = located(path, dict(options))
    folder = Path(path, given.get("subfolder") or "")
    encoding = None if given.get("gguf_file") else encoding_in(stated_in(path, folder, given))
    if encoding is None or encoding.is_plain:
        return {}
    return {"quantization_config": DSAQuantizationConfig(run_packed=run_packed)}
