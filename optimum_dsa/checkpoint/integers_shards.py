"""Shards whose matrices are whole numbers and scales: written tensor by tensor, and made dense again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..common.files import read_json, write_text
from ..common.shard_writer import ShardWriter, width
from ..packed.grid import Grid
from .encodings import DENSE, decoded
from .integers_format import FORMAT, METHOD, PARTS, pack_numbers, unpack_numbers
from .shards import Shards, find_shards, index_name, open_shard, packed_headers


@dataclass(frozen=True)
class Held:
    """A tensor of a checkpoint: its file, its shape made dense, the bytes of an element, safetensors' name of it."""

    file: str
    shape: tuple[int, ...]
    width: int
    dtype: str | None


def held_in(shards: Shards) -> dict[str, Held]:
    """Name -> tensor, of a whole checkpoint; nothing but headers is read."""
    found = {}
    for file in shards.files:
        packed = packed_headers(shards.folder / file)
        with open_shard(shards.folder / file) as opened:
            for name in sorted(opened.keys()):
                part, header = opened.get_slice(name), packed.get(name)
                kind = part.get_dtype()
                if header is None:
                    found[name] = Held(file, tuple(part.get_shape()), width(kind), kind)
                else:
                    found[name] = Held(file, tuple(header.shape), header.dtype.itemsize, None)
    return found


def write_integers(
    shards: Shards, folder: Path, chosen: Collection[str], on_grid: Callable[[Tensor], Grid], bits: int
) -> tuple[int, int]:
    """Write every shard to `folder` with the `chosen` tensors as whole numbers; bytes of all before, dense, and after.

    Args:
        on_grid: a weight, (rows, columns) -> its grid of `bits`, whose scales are of the weight's type.
    """
    held, index, before, after = held_in(shards), {}, 0, 0
    for file, name in _names(shards):
        own = {tensor: each for tensor, each in held.items() if each.file == file}
        plain = {tensor: each for tensor, each in own.items() if tensor not in chosen}
        whole = {tensor: each for tensor, each in own.items() if tensor in chosen}
        made = [_part(tensor, part) for tensor in whole for part in PARTS]
        writer = ShardWriter(folder / name, [*plain, *made], {"format": "pt"})
        with open_shard(shards.folder / file) as opened, writer:
            read, written = _write_shard(opened, writer, plain, whole, on_grid, bits)
        before, after = before + read, after + written
        index |= dict.fromkeys([*plain, *made], name)
    _write_index(folder, index, after)
    return before, after


def _write_shard(
    opened: Any,
    writer: ShardWriter,
    plain: Mapping[str, Held],
    whole: Mapping[str, Held],
    on_grid: Callable[[Tensor], Grid],
    bits: int,
) -> tuple[int, int]:
    """Write the tensors of a shard, the widest types first: each begins at a multiple of its width."""
    before, after, scales = 0, 0, {}

    def add(name: str, tensor: Tensor, dtype: str | None = None) -> None:
        nonlocal after
        writer.add(name, tensor, dtype)
        after += tensor.nbytes

    def dense(name: str) -> Tensor:
        nonlocal before
        tensor = opened.get_tensor(name)
        again = decoded(tensor, name)
        found = tensor if again is None else again
        before += found.nbytes
        return found

    def add_plain(least: int, most: int) -> None:
        for name, each in sorted(plain.items(), key=lambda item: -item[1].width):
            if least <= each.width <= most:
                add(name, dense(name), each.dtype)

    add_plain(8, 16)
    for name, each in whole.items():
        add(_part(name, PARTS[2]), torch.tensor(each.shape), "I64")
    for name in whole:
        weight = dense(name)
        grid = on_grid(weight)
        scales[_part(name, PARTS[1])] = grid.scales.to(weight.dtype)
        add(_part(name, PARTS[0]), pack_numbers(grid.numbers, bits), "I32")
    add_plain(4, 7)
    for name, tensor in sorted(scales.items(), key=lambda item: -item[1].itemsize):
        add(name, tensor)
    add_plain(0, 3)
    return before, after


def is_integers(stated: Any) -> bool:
    """Whether the content of a `config.json` says that its matrices are packed numbers."""
    section = stated.get("quantization_config") if isinstance(stated, dict) else None
    return isinstance(section, dict) and section.get("quant_method") == METHOD and section.get("format") == FORMAT


def restore(source: Path, folder: Path) -> None:
    """Write the checkpoint in `source`, of packed numbers, to `folder` with dense matrices: numbers times scales.

    Raises:
        ValueError: its numbers are none that `quantize` writes; a part of a matrix is missing, or does not fit.
    """
    config = read_json(source / "config.json")
    bits, group = _settings(config, source)
    shards, index = find_shards(source), {}
    held = held_in(shards)
    folder.mkdir(parents=True, exist_ok=True)
    for file, name in _names(shards):
        own = [tensor for tensor, each in held.items() if each.file == file]
        plain = [tensor for tensor in own if not tensor.endswith(PARTS)]
        made = [tensor.removesuffix("_packed") for tensor in own if tensor.endswith(PARTS[0])]
        with open_shard(source / file) as opened, ShardWriter(folder / name, [*plain, *made], {"format": "pt"}) as out:
            for tensor in sorted(plain, key=lambda tensor: -held[tensor].width):
                out.add(tensor, opened.get_tensor(tensor), held[tensor].dtype)
            for tensor in made:
                numbers, scales, shape = (_read(opened, _part(tensor, part), held, source) for part in PARTS)
                grid = Grid(unpack_numbers(numbers, bits, shape.tolist()), scales.float(), group)
                out.add(tensor, grid.weights(scales.dtype))
        index |= dict.fromkeys([*plain, *made], name)
    _write_index(folder, index, 0)
    stated = {key: value for key, value in config.items() if key != "quantization_config"}
    write_text(folder / "config.json", json.dumps(stated))


def _settings(config: Mapping[str, Any], source: Path) -> tuple[int, int]:
    """Bits, and columns that share a scale."""
    groups = [one.get("weights") or {} for one in (config["quantization_config"].get("config_groups") or {}).values()]
    settings = {(one.get("num_bits"), one.get("group_size") or 0, one.get("symmetric")) for one in groups}
    (bits, group, symmetric) = settings.pop() if len(settings) == 1 else (None, 0, False)
    if bits not in (4, 8) or not symmetric:
        raise ValueError(
            f"{source} has numbers that `optimum-cli dsa quantize` does not write, and none else are read."
        )
    return bits, max(group, 0)


def _read(opened: Any, name: str, held: Mapping[str, Held], source: Path) -> Tensor:
    # Parts of a matrix are in one shard of what is written here.
    try:
        return opened.get_tensor(name)
    except SafetensorError as error:
        where = held[name].file if name in held else "no shard"
        raise ValueError(f"{name} is in {where} of {source}, and not beside its other parts.") from error


def _part(name: str, part: str) -> str:
    return f"{name.removesuffix('weight')}{part}"


def _names(shards: Shards) -> list[tuple[str, str]]:
    """The files of a checkpoint, and what they are called where they are written again."""
    total = len(shards.files)
    if total == 1:
        return [(shards.files[0], f"{DENSE.stem}.safetensors")]
    return [(file, f"{DENSE.stem}-{n:05d}-of-{total:05d}.safetensors") for n, file in enumerate(shards.files, 1)]


def _write_index(folder: Path, index: Mapping[str, str], size: int) -> None:
    if len(set(index.values())) > 1:
        facts = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        write_text(folder / index_name(DENSE.stem), json.dumps(facts, indent=2) + "\n")
