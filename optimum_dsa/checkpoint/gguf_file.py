"""Models as GGUF files, for llama.cpp: plain ones, and Llamas whose layers have widths of their own (`deci`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..common.installation import how_to_install
from ..pruning.configuration import CONFIG_NAME
from .encodings import decoded
from .gguf_families import Family, family_of, layer_widths, made_tensors, write_sizes
from .gguf_tensors import BITS, BLOCK, Part, kind_of, parts_of
from .gguf_tokenizer import write_tokenizer
from .load import read_configuration
from .shards import Shards, find_shards, open_shard, packed_headers
from .skeleton import open_skeleton


KEYS = {name: f"optimum_dsa.{name}" for name in ("config", "description", "names")}  # for `verify`, see gguf_read.py

logger = logging.getLogger(__name__)


def write_gguf(folder: Path, path: Path, kind: str) -> int:
    """Write the checkpoint in `folder` to the file `path`, its matrices as `kind`; bytes of all tensors.

    One tensor at a time is in memory. Of a pruned model, its `config.json` and `dsa_config.json` go along.

    Raises:
        ValueError: it cannot be said in a GGUF of these families, or the package gguf is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"A GGUF is written by the package gguf, which is not installed: {how_to_install('gguf')}."
        ) from error
    config = read_configuration(str(folder), {})
    family = family_of(config, folder)
    shards = find_shards(folder)
    places = _places(shards)
    _check_shapes(folder, places)
    arch, parts = plan(config, family, {name: shape for name, (_, shape) in places.items()})
    called = [part.called for part in parts]
    kinds = [kind_of(part, kind, called) for part in parts]
    _say_what_stays(parts, kinds, kind)
    writer = gguf.GGUFWriter(path, arch)
    write_sizes(writer, config, family, layer_widths(config))
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"))
    if kind in BITS:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_tokenizer(writer, folder, config)
    _write_description(writer, folder, list(places))
    made, total = made_tensors(config), 0
    for name, tensor in made.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
    for part, own in zip(parts, kinds):
        total += _announce(writer, part, gguf.GGMLQuantizationType[own.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in made.values():
        writer.write_tensor_data(tensor.numpy())
    with ExitStack() as stack:
        files = {file: stack.enter_context(open_shard(folder / file)) for file in shards.files}
        for part, own in zip(parts, kinds):
            tensor = part.make([_dense(files[places[name][0]], name) for name in part.names])
            array = np.ascontiguousarray(tensor.numpy())
            writer.write_tensor_data(gguf.quantize(array, gguf.GGMLQuantizationType[own.upper()]))
    writer.close()
    return total


def plan(config: Any, family: Family, shapes: dict[str, tuple[int, ...]]) -> tuple[str, list[Part]]:
    """What llama.cpp calls the architecture of a model, and the tensors of its file.

    Args:
        shapes: name -> shape of the checkpoint's tensors, dense.
    """
    import gguf

    widths = layer_widths(config)
    arch = family.arch if len(set(widths)) == 1 or family.per_layer is None else family.per_layer
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return arch, parts_of(shapes, family, widths, config, gguf.get_tensor_name_map(number, len(widths)))


def _places(shards: Shards) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> file and shape, dense, of every tensor of a checkpoint; nothing but headers is read."""
    found = {}
    for file in shards.files:
        packed = packed_headers(shards.folder / file)
        with open_shard(shards.folder / file) as opened:
            for name in sorted(opened.keys()):
                shape = packed[name].shape if name in packed else opened.get_slice(name).get_shape()
                found[name] = file, tuple(shape)
    return found


def _dense(file: Any, name: str) -> Tensor:
    tensor = file.get_tensor(name)
    plain = decoded(tensor, name)
    return tensor if plain is None else plain


def _check_shapes(folder: Path, places: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    said = {name: tuple(tensor.shape) for name, tensor in open_skeleton(folder)[0].state_dict().items()}
    for name, (_, shape) in places.items():
        if shape != said.get(name, shape):
            raise ValueError(
                f"{name} is {shape} in {folder}, and by its config.json it is {said[name]}: they do not belong "
                "together."
            )


def _announce(writer: Any, part: Part, kind: Any) -> int:
    """Write what a tensor will be; its bytes."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (*part.shape[:-1], part.shape[-1] // block * size)
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind)
    total = int(np.prod(shape))
    if plain is not None:
        writer.add_tensor_info(part.called, part.shape, np.dtype(plain), total)
    else:
        writer.add_tensor_info(part.called, shape, np.dtype(np.uint8), total, raw_dtype=kind)
    return total


def _say_what_stays(parts: Sequence[Part], kinds: Sequence[str], kind: str) -> None:
    odd = [part for part, own in zip(parts, kinds) if kind in BITS and own == "f16"]
    if odd:
        logger.warning(
            "%d matrices stay float16, as their rows do not divide by %d, such as %s (%d).",
            *(len(odd), BLOCK, odd[0].names[0], odd[0].shape[-1]),
        )


def _write_description(writer: Any, folder: Path, names: list[str]) -> None:
    """Write what `verify` needs to count the zeros of a pruned model in the file alone."""
    if not (folder / CONFIG_NAME).is_file():
        return
    writer.add_string(KEYS["config"], (folder / "config.json").read_text(encoding="utf-8"))
    writer.add_string(KEYS["description"], (folder / CONFIG_NAME).read_text(encoding="utf-8"))
    writer.add_array(KEYS["names"], names)
