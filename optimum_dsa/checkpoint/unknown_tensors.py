"""Tensors of a checkpoint that its model's class does not know: a head for more tokens, blocks that only others run.

transformers leaves them out without a word, and config.json still promises them. They are not pruned, and go along;
those that a quantiser packed cannot, beside weights that were made dense, and are named.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..common.fences import name_when_loaded
from ..common.files import write_text
from ..common.shard_writer import ShardWriter, width
from ..model.adapters import inner_model, plain_name
from .encodings import decoded
from .pickles import open_pickle
from .shards import find_shards, index_name, open_shard, packed_headers


logger = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
_PLAIN = ("BF16", "F16", "F32", "F64")
_TABLES = ("masked_bias", "position_ids", "inv_freq")  # computed by the class: no weights, and of no use to it


def unknown_tensors(model: nn.Module, files: Iterable[Path], quantised: bool = False) -> dict[str, Path]:
    """Name -> file of every tensor in `files`, safetensors or .bin, that does not end up in `model`.

    Args:
        quantised: whether the files have more tensors for a weight than one, such as its scales.
    """
    inner = inner_model(model)
    known = {name for name, _ in inner.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in inner.named_buffers(remove_duplicate=False)} | set(inner.state_dict())
    known |= {plain_name(name) for name in known}  # adapters in a model put words of their own into names
    loaded = name_when_loaded(inner, known)
    if loaded is None:
        logger.info("This transformers does not tell which tensors a model does not know; none is looked for.")
        return {}
    modules = {name for name, _ in inner.named_modules()} if quantised else set()
    # a checkpoint may leave out where the model under the head stands
    modules |= {name.removeprefix(f"{getattr(inner, 'base_model_prefix', None)}.") for name in modules}
    found = {}
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                if loaded(name) in known or _is_table(name, len(file.get_slice(name).get_shape())):
                    continue
                module = name.rpartition(".")[0]
                if quantised and (module in modules or loaded(f"{module}.weight") in known):
                    continue  # what a known weight was packed into
                found[name] = path
    return found


def packed_parts(tensors: Mapping[str, Path]) -> set[str]:
    """Parts of the model of which a tensor is no weight by itself: in 8 bits or less, or packed into integers."""
    return {part_of(name) for name, kind in _kinds(tensors).items() if kind not in _PLAIN}


def _kinds(tensors: Mapping[str, Path]) -> dict[str, str]:
    """Name -> type of each of the tensors, as safetensors names it."""
    found = {}
    for path in dict.fromkeys(tensors.values()):
        with _open(path) as file:
            found |= {name: file.get_slice(name).get_dtype() for name, place in tensors.items() if place == path}
    return found


@contextmanager
def _open(path: Path, framework: str = "np") -> Iterator[Any]:
    with open_pickle(path) if path.suffix == ".bin" else open_shard(path, framework) as file:
        yield file


def _is_table(name: str, dimensions: int) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf in _TABLES or (leaf == "bias" and dimensions == 4)  # GPT-2's triangle of what a token may see


def sizes_by_part(tensors: Mapping[str, Path]) -> dict[str, int]:
    """Part of the model -> weights, zeros included, of the tensors in it: "model.layers.92" -> 1,024."""
    found: dict[str, int] = {}
    for name, size, _ in _facts(tensors):
        found[part_of(name)] = found.get(part_of(name), 0) + size
    return found


def bytes_of(tensors: Mapping[str, Path]) -> int:
    """Bytes that they take, dense."""
    return sum(size * width for _, size, width in _facts(tensors))


def _facts(tensors: Mapping[str, Path]) -> Iterator[tuple[str, int, int]]:
    """Name, weights, and bytes of one of them when it is dense; nothing but headers is read."""
    for path in dict.fromkeys(tensors.values()):
        packed = {} if path.suffix == ".bin" else packed_headers(path)
        with _open(path) as file:
            for name in (name for name, place in tensors.items() if place == path):
                part = file.get_slice(name)
                if name in packed:
                    yield name, packed[name].size, packed[name].dtype.itemsize
                else:
                    yield name, math.prod(part.get_shape()), width(part.get_dtype())


def part_of(name: str) -> str:
    """The first block that a tensor is in, by its number; without one, its module."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: at + 1]) if at is not None else ".".join(parts[:-1]) or name


def add_tensors(folder: Path, tensors: Mapping[str, Path]) -> None:
    """Write `tensors`, name -> file that holds them, beside the weights in `folder`, as further shards of these.

    One at a time is in memory; they are dense there, whatever the encoding of the others.
    """
    if not tensors:
        return
    shards = find_shards(folder)
    groups = _groups(tensors)
    stem, total = shards.encoding.stem, len(shards.files) + len(groups)
    weight_map = dict((shards.index or {}).get("weight_map") or {})
    renamed = {}
    for number, name in enumerate(shards.files, 1):
        renamed[name] = f"{stem}-{number:05d}-of-{total:05d}.safetensors"
        if not weight_map or shards.index is None:
            with open_shard(folder / name, "np") as file:
                weight_map |= dict.fromkeys(file.keys(), name)
        (folder / name).rename(folder / f"{renamed[name]}.moved")  # its new name may be another's old one
    weight_map = {name: renamed[file] for name, file in weight_map.items()}
    for name in renamed.values():
        (folder / f"{name}.moved").rename(folder / name)
    size = sum((folder / name).stat().st_size for name in renamed.values())
    for number, names in enumerate(groups, len(shards.files) + 1):
        name = f"{stem}-{number:05d}-of-{total:05d}.safetensors"
        size += _write(folder / name, names, tensors)
        weight_map |= dict.fromkeys(names, name)
    facts = (shards.index or {}).get("metadata")
    metadata = {**(facts if isinstance(facts, dict) else {}), "total_size": size}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / index_name(stem), json.dumps(index, indent=2) + "\n")


def _groups(tensors: Mapping[str, Path]) -> list[list[str]]:
    """The names in files of at most `SHARD_BYTES`, as far as single tensors allow; the widest types first in each."""
    # so that every tensor begins at a multiple of its width
    facts = sorted(_facts(tensors), key=lambda fact: -fact[2])
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size, bytes in facts:
        if groups[-1] and filled + size * bytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size * bytes
    return groups


def _write(target: Path, names: list[str], tensors: Mapping[str, Path]) -> int:
    """Bytes of the named tensors, written to `target`."""
    size = 0
    with ShardWriter(target, names, {"format": "pt"}) as writer, ExitStack() as opened:
        files = {path: opened.enter_context(_open(path, "pt")) for path in {tensors[name] for name in names}}
        for name in names:
            file = files[tensors[name]]
            kind, tensor = file.get_slice(name).get_dtype(), file.get_tensor(name)
            plain = decoded(tensor, f"{name} in {tensors[name]}")
            writer.add(name, *((tensor, kind) if plain is None else (plain, None)))
            size += (tensor if plain is None else plain).nbytes
    return size
