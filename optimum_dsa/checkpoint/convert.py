"""Checkpoints from one encoding to another, shard by shard and without a model."""

from __future__ import annotations

import json
import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from ..common.files import read_json, write_text
from ..common.folder_files import own_file
from ..common.installation import how_to_install
from ..common.manifest import MANIFEST, files_in
from ..common.output import OutputFolder
from ..common.shard_writer import ShardWriter, width
from ..packed.whole import WholeHeader
from .base_files import MODULES, module_folders
from .encodings import BITMASK, BITMASK_WHOLE, ENCODINGS, QUANT_METHOD, Encoding, Header, decoded, encoding_named
from .shards import Shards, find_shards, index_name, open_shard, packed_headers


MARK = "transformers_weights"  # the key of `config.json` where transformers looks for the name of the weights
# What transformers says instead of loading, where this package was not imported: it takes this for the name of a file.
HOW_TO_LOAD = (
    f"<these weights are compressed by optimum-dsa: install it ({how_to_install()}) and `import optimum_dsa` before "
    "loading, or ask for a dense copy made with `optimum-cli dsa convert`>"
)
# Weights in other formats, which would be another copy of the same ones: they stay where they are.
OTHER_WEIGHTS = ("pytorch_model*.bin*", "tf_model*.h5", "flax_model*.msgpack*", "*.gguf", "*.onnx*", "*.pt", "*.pth")

PACKED = "packed"  # what `to` and `encoding` call weights that are compressed, and stay so when they are loaded
LEAST_SAVED = 0.01  # share of the bytes: below it a checkpoint would load less widely for nothing

logger = logging.getLogger(__name__)


def convert(source: str | Path, directory: str | Path, to: str) -> tuple[int, int]:
    """Write the checkpoint in `source` to `directory` in another encoding; bytes of the weights before, after.

    Every tensor is bit for bit the same when it is loaded. One tensor at a time is in memory. The other files of the
    checkpoint go along, but for weights in other formats and hidden files, which are named in a log line.

    `directory` is written whole or not at all. It may be `source`, where `save_pretrained` or this function wrote the
    weights; then every other file stays.

    Args:
        to (`str`): "dense", "compressed" (the encoding "bitmask"), "quantised" ("bitmask_whole"), for a model that was
            pruned with `values="int8"` or `"int4"`, as nothing is rounded here, or "packed": compressed, or quantised
            where it is so, and a note that matrices stay packed when it is loaded, unless a caller asks for something
            else.

    Raises:
        FileNotFoundError: `source` holds no weights in safetensors.
        ForeignFileError: `directory` holds what was not written here.
        OutputError: it cannot be written.
        ValueError: the checkpoint is in that form already, quantised, damaged, or has too few zeros to become smaller.
    """
    run_packed = to == PACKED
    source, target = Path(source), encoding_named(BITMASK.name if run_packed else to)
    if not source.is_dir():
        raise FileNotFoundError(f"No folder {source}.")
    shards = find_shards(source)
    if run_packed and shards.encoding is BITMASK_WHOLE:
        target = BITMASK_WHOLE
    # Before anything is read: a link may lead to a file of somebody else.
    for name in ("config.json", *shards.files, *([] if shards.index is None else [index_name(shards.encoding.stem)])):
        own_file(source / name, source)
    stated = read_json(source / "config.json")
    config = converted_config(stated, target, source, run_packed)
    if shards.encoding is target and runs_packed(stated) == run_packed:
        raise ValueError(f"{source} is {to} already; nothing was written.")
    in_place = Path(directory).is_dir() and source.samefile(directory)
    others, left = other_files(shards)
    if in_place:
        others, left = [*others, *left], []
    sizes: tuple[int, int] = (0, 0)

    def fill(folder: Path) -> None:
        nonlocal sizes
        output.carry(source, others, folder)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        sizes = convert_weights(shards, folder, target)
        # After the work: only the zeros of all tensors tell, and the folder is not there yet.
        if shards.encoding.is_plain and sizes[1] > sizes[0] * (1 - LEAST_SAVED):
            raise ValueError(
                f"{source} would not become smaller: it has {sizes[0]:,} bytes of weights, {sizes[1]:,} without the "
                "zeros, of which there are too few. Nothing was written."
            )

        if target is BITMASK_WHOLE and not _has_numbers(folder):
            raise ValueError(
                f"No matrix of {source} lies on a grid of 8 or 4 bits, and what is stored is never rounded; prune it "
                "with values='int8' or values='int4' first, or use to='compressed'. Nothing was written."
            )

    with OutputFolder(directory, kept=others if in_place else ()) as output:
        output.require(_bytes_after(shards))
        output.write(fill, rescue=False)  # the source is still there
    if left:
        logger.warning("Not taken along from %s: %s.", source, ", ".join(left))
    return sizes


def _has_numbers(folder: Path) -> bool:
    """Whether any tensor in `folder`, of quantised weights, is held as whole numbers."""
    files = find_shards(folder).files
    return any(isinstance(header, WholeHeader) for file in files for header in packed_headers(folder / file).values())


def encode_in_place(folder: Path, encoding: Encoding, run_packed: bool = False) -> None:
    """Replace the dense weights in `folder`, which transformers wrote, by encoded ones, shard after shard.

    Weights that do not become smaller are encoded all the same, with a warning: that was asked for, and takes no work
    from anybody.
    """
    config = converted_config(read_json(folder / "config.json"), encoding, folder, run_packed)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    shards = find_shards(folder)
    before, after = convert_weights(shards, folder, encoding, remove=True)
    if after > before * (1 - LEAST_SAVED):
        logger.warning(
            "The %s weights are no smaller than dense ones, which every program can read; save the "
            "model again without that.",
            encoding.shown,
        )
    if shards.index is not None:
        (folder / index_name(shards.encoding.stem)).unlink()
    if encoding is BITMASK_WHOLE and not _has_numbers(folder):
        logger.warning("No matrix lies on a grid of 8 or 4 bits, so that the %s weights hold none.", encoding.shown)


def runs_packed(config: Any) -> bool:
    """Whether the content of a `config.json` says that matrices stay packed."""
    section = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(section, dict) and section.get("run_packed") is True


def check_not_quantised(config: Any, folder: Path) -> None:
    """Raise `ValueError` where a `config.json` says that weights are quantised by a method that is not of here."""
    present = config.get("quantization_config") if isinstance(config, dict) else None
    method = present.get("quant_method") if isinstance(present, dict) else present
    if method not in (None, QUANT_METHOD):
        raise ValueError(
            f"{folder} is quantised ({method}); only checkpoints that are not can be converted. Convert the one that "
            "it was made from."
        )


def converted_config(config: Any, to: Encoding, folder: Path, run_packed: bool = False) -> dict[str, Any]:
    """The content of a `config.json` after conversion; `ValueError` where weights are quantised by another method."""
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is no configuration of a model.")
    check_not_quantised(config, folder)
    config = {name: value for name, value in config.items() if name not in ("quantization_config", MARK)}
    if to.entry is not None:
        config["quantization_config"] = to.entry | ({"run_packed": True} if run_packed else {})
        config[MARK] = HOW_TO_LOAD
    return config


def convert_weights(shards: Shards, target: Path, to: Encoding, remove: bool = False) -> tuple[int, int]:
    """Write every shard to `target` in another encoding, and their index; bytes of all tensors before and after.

    With `remove`, each shard is deleted when it has been written.
    """
    stem, total = to.stem, len(shards.files)
    single = to.is_plain and total == 1  # our own loader asks for an index, others for one file
    weight_map: dict[str, str] = {}
    before = after = 0
    for number, file in enumerate(shards.files, 1):
        name = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{total:05d}.safetensors"
        names, read, written = _convert_shard(shards.folder / file, target / name, shards.encoding, to)
        weight_map |= dict.fromkeys(names, name)
        before, after = before + read, after + written
        if remove:
            (shards.folder / file).unlink()
    # Only now is every name of every shard known.
    missing = sorted(set((shards.index or {}).get("weight_map", {})) - weight_map.keys())
    if missing:
        raise ValueError(f"{shards.folder} lacks {missing[0]}, which its index names; the checkpoint is incomplete.")
    if not single:
        facts = (shards.index or {}).get("metadata")
        metadata = {**facts, "total_size": after} if isinstance(facts, dict) else {"total_size": after}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_text(target / index_name(stem), json.dumps(index, indent=2) + "\n")
    return before, after


def _convert_shard(source: Path, target: Path, of: Encoding, to: Encoding) -> tuple[list[str], int, int]:
    """Names of the tensors, and their bytes before and after."""
    packed = packed_headers(source)
    if of.is_plain and packed:
        raise ValueError(f"{source} holds packed tensors already, such as {next(iter(packed))}.")
    before = after = 0
    with open_shard(source) as file:
        # the widest types first, so that every tensor begins at a multiple of its width
        names = list(file.keys())
        widths = {name: _width(file, name, packed) for name in names}
        names.sort(key=lambda name: (-widths[name], name))
        with ShardWriter(target, names, {"format": "pt", **(file.metadata() or {})}) as writer:
            for name in names:
                kind, tensor = file.get_slice(name).get_dtype(), file.get_tensor(name)
                changed = _changed(tensor, to, f"{name} in {source}")
                writer.add(name, *((tensor, kind) if changed is None else (changed, None)))
                before += tensor.nbytes
                after += (tensor if changed is None else changed).nbytes
    return names, before, after


def _changed(tensor: torch.Tensor, to: Encoding, name: str) -> torch.Tensor | None:
    """The tensor, of any shape or (bytes,) uint8, in another encoding; `None` where it stays as it is."""
    plain = decoded(tensor, name)
    if to.encode is None:
        return plain
    again = to.encode(tensor if plain is None else plain)
    return plain if again is None else again


def _width(file: Any, name: str, packed: dict[str, Header]) -> int:
    """Bytes of an element, dense: of `BF16` two, of what does not say it (`BOOL`) one."""
    if name in packed:
        return packed[name].dtype.itemsize
    # Not from the tensor: its dtype is known from the header, without reading a byte.
    return width(file.get_slice(name).get_dtype())


def _bytes_after(shards: Shards) -> int:
    """Bytes that the weights take as they are: exact for a plain encoding, and at most for any other."""
    total = 0
    for file in shards.files:
        total += (shards.folder / file).stat().st_size
        headers = packed_headers(shards.folder / file).values()
        total += sum(header.size * header.dtype.itemsize - header.bytes for header in headers)
    return total


def other_files(shards: Shards) -> tuple[list[str], list[str]]:
    """The files of a checkpoint beside its weights and `config.json`: those that go along, and those that stay.

    Of a link out of the folder, `ValueError`.
    """
    indexes = [index_name(encoding.stem) for encoding in ENCODINGS.values()]
    weights = {*shards.files, *indexes, "config.json", MANIFEST}
    others, left = [], []
    # Their weights are of no other form of the model, but of what comes after it.
    modules = module_folders(read_json(shards.folder / MODULES)) if (shards.folder / MODULES).is_file() else ()
    for name in files_in(shards.folder):
        if name in weights:
            continue
        path = own_file(shards.folder / name, shards.folder)
        hidden = any(part.startswith(".") for part in Path(name).parts)
        other = name.split("/")[0] not in modules and any(fnmatch(path.name, pattern) for pattern in OTHER_WEIGHTS)
        (left if hidden or other else others).append(name)
    return others, left
