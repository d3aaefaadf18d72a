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
from ..common.shard_writer import NAMES, ShardWriter, width
from ..packed.grid import Grid
from .encodings import DENSE, decoded
from .integers_format import FORMATS, METHOD, SCALE, SHAPE, IntegerFormat, pack_numbers, packed_shape, unpack_numbers
from .shards import Shards, find_shards, index_name, open_shard, packed_headers


_TYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Held:
    """A tensor of a checkpoint: its file, its shape made dense, safetensors' name of its type."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return width(self.dtype)


def held_in(shards: Shards) -> dict[str, Held]:
    """Name -> tensor, of a whole checkpoint; nothing but headers is read."""
    found = {}
    for file in shards.files:
        packed = packed_headers(shards.folder / file)
        with open_shard(shards.folder / file) as opened:
            for name in sorted(opened.keys()):
                part, header = opened.get_slice(name), packed.get(name)
                if header is None:
                    found[name] = Held(file, tuple(part.get_shape()), part.get_dtype())
                else:
                    found[name] = Held(file, tuple(header.shape), NAMES[header.dtype])
    return found


def write_integers(
    shards: Shards,
    folder: Path,
    chosen: Collection[str],
    on_grid: Callable[[Tensor], Grid],
    bits: int,
    group: int,
    form: IntegerFormat,
) -> tuple[int, int]:
    """Write every shard to `folder` with the `chosen` tensors as whole numbers; bytes of all before, dense, and after.

    Args:
        on_grid: a weight, (rows, columns) -> its grid of `bits`, whose scales, of `group` columns each, are of the
            weight's type.
        form: how the numbers are stored.
    """
    held, index, before, after = held_in(shards), {}, 0, 0
    for file, name in _names(shards):
        own = {tensor: each for tensor, each in held.items() if each.file == file}
        plain = {tensor: each for tensor, each in own.items() if tensor not in chosen}
        whole = {tensor: each for tensor, each in own.items() if tensor in chosen}
        made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for tensor, each in whole.items():
            made |= _laid_out(tensor, each, bits, group, form)
        writer = ShardWriter(folder / name, [*plain, *made], {"format": "pt"})
        with open_shard(shards.folder / file) as opened, writer:
            # The widest types first: each begins at a multiple of its width.
            widths = {tensor: each.width for tensor, each in plain.items()}
            widths |= {part: dtype.itemsize for part, (_, dtype) in made.items()}
            for tensor in sorted(widths, key=lambda tensor: -widths[tensor]):
                if tensor in made:
                    writer.reserve(tensor, *made[tensor])
                else:
                    weight = _dense(opened, tensor)
                    before, after = before + weight.nbytes, after + weight.nbytes
                    writer.add(tensor, weight, plain[tensor].dtype)
            for tensor in whole:
                weight = _dense(opened, tensor)
                before += weight.nbytes
                for part, value in _stored(tensor, weight, on_grid(weight), bits, form).items():
                    writer.fill(part, value)
                    after += value.nbytes
        index |= dict.fromkeys(widths, name)
    _write_index(folder, index, after)
    return before, after


def _laid_out(
    name: str, held: Held, bits: int, group: int, form: IntegerFormat
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The parts of a matrix: shape and type of each."""
    rows, columns = held.shape
    scales = (rows, columns // group if group else 1)
    found = {_part(name, SCALE): (scales, _TYPES[held.dtype])}
    if form.packed:
        found[_part(name, form.numbers)] = (packed_shape(held.shape, bits), torch.int32)
        found[_part(name, SHAPE)] = ((2,), torch.int64)
    else:
        found[_part(name, form.numbers)] = (held.shape, torch.int8)
    return found


def _stored(name: str, weight: Tensor, grid: Grid, bits: int, form: IntegerFormat) -> dict[str, Tensor]:
    """The parts of a matrix, as they lie in a shard."""
    found = {_part(name, SCALE): grid.scales.to(weight.dtype)}
    if form.packed:
        found[_part(name, form.numbers)] = pack_numbers(grid.numbers, bits)
        found[_part(name, SHAPE)] = torch.tensor(weight.shape)
    else:
        found[_part(name, form.numbers)] = grid.numbers
    return found


def is_integers(stated: Any) -> bool:
    """Whether the content of a `config.json` says that its matrices are whole numbers in one of the formats."""
    section = stated.get("quantization_config") if isinstance(stated, dict) else None
    return isinstance(section, dict) and section.get("quant_method") == METHOD and section.get("format") in FORMATS


def restore(source: Path, folder: Path) -> None:
    """Write the checkpoint in `source`, of whole numbers, to `folder` with dense matrices: numbers times scales.

    Raises:
        ValueError: its numbers are none that `quantize` writes; a part of a matrix is missing, or does not fit.
    """
    config = read_json(source / "config.json")
    bits, group, form = _settings(config, source)
    shards, index = find_shards(source), {}
    held = held_in(shards)
    kind = "I32" if form.packed else "I8"
    made = [
        name.removesuffix(form.numbers) + "weight"
        for name, each in held.items()
        if name.endswith(form.numbers) and each.dtype == kind
    ]
    parts = {_part(name, part) for name in made for part in form.parts}
    folder.mkdir(parents=True, exist_ok=True)
    for file, name in _names(shards):
        plain = [tensor for tensor, each in held.items() if each.file == file and tensor not in parts]
        here = [tensor for tensor in made if held[_part(tensor, form.numbers)].file == file]
        with open_shard(source / file) as opened, ShardWriter(folder / name, [*plain, *here], {"format": "pt"}) as out:
            for tensor in sorted(plain, key=lambda tensor: -held[tensor].width):
                out.add(tensor, opened.get_tensor(tensor), held[tensor].dtype)
            for tensor in here:
                numbers, scales, *shape = (_read(opened, _part(tensor, part), held, source) for part in form.parts)
                if form.packed:
                    numbers = unpack_numbers(numbers, bits, shape[0].tolist())
                out.add(tensor, Grid(numbers, scales.float(), group).weights(scales.dtype))
        index |= dict.fromkeys([*plain, *here], name)
    _write_index(folder, index, 0)
    stated = {key: value for key, value in config.items() if key != "quantization_config"}
    write_text(folder / "config.json", json.dumps(stated))


def _settings(config: Mapping[str, Any], source: Path) -> tuple[int, int, IntegerFormat]:
    """Bits, columns that share a scale, and the format."""
    stated = config["quantization_config"]
    form = FORMATS[stated["format"]]
    groups = [one.get("weights") or {} for one in (stated.get("config_groups") or {}).values()]
    settings = {(one.get("num_bits"), one.get("group_size") or 0, one.get("symmetric")) for one in groups}
    (bits, group, symmetric) = settings.pop() if len(settings) == 1 else (None, 0, False)
    if bits not in form.bits or not symmetric:
        raise ValueError(
            f"{source} has numbers that `optimum-cli dsa quantize` does not write, and none else are read."
        )
    return bits, max(group, 0), form


def _dense(opened: Any, name: str) -> Tensor:
    stored = opened.get_tensor(name)
    again = decoded(stored, name)
    return stored if again is None else again


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
