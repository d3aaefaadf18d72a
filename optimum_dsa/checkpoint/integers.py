"""Checkpoints as whole numbers times scales, in the format of compressed-tensors: transformers and vLLM load them.

Of every matrix `NAME.weight` there is `NAME.weight_scale`, a scale for every group of a row. The numbers are
packed into int32, `NAME.weight_packed`, with `NAME.weight_shape` beside (`pack-quantized`), or each is an int8,
`NAME.weight` (`int-quantized`). Grids are symmetric: a zero is a zero.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.fences import tied_names
from ..common.files import read_json, write_text
from ..common.folder_files import own_file
from ..common.output import OutputFolder
from ..model.architecture import find_architecture
from ..packed.grid import SCALES, Grid, grid_of, groups_of, largest, to_grid, to_scales
from .convert import converted_config, other_files
from .encodings import DENSE
from .integers_format import FORMATS, entry
from .integers_shards import held_in, write_integers
from .shards import find_shards
from .skeleton import open_skeleton


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantised:
    """What `quantize` wrote; `print` shows it.

    Attributes:
        bits (`int`): of a number.
        group (`int`): columns that share a scale; 0 for all of a row.
        matrices (`int`): that are whole numbers now.
        as_they_were (`int`): of these, those that lay on such a grid before, and are bit for bit what they were.
        kept (`Mapping[str, str]`): matrices of blocks that stay as they are -> why.
        bytes_before (`int`): of all weights, dense.
        bytes (`int`): of all weights, written.
        format (`str`): how compressed-tensors calls what was written.
    """

    bits: int
    group: int
    matrices: int
    as_they_were: int = 0
    kept: Mapping[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes: int = 0
    format: str = "pack-quantized"

    def __str__(self) -> str:
        by = f"a scale for {self.group} columns" if self.group else "a scale for a row"
        same = f", {self.as_they_were} of them bit for bit as they were" if self.as_they_were else ""
        lines = [
            f"{self.matrices} matrices of {self.bits} bits, {by}{same}; weights had {self.bytes_before:,} bytes, "
            f"and have {self.bytes:,} now ({self.bytes / max(self.bytes_before, 1):.1%}), in {self.format}"
        ]
        if FORMATS[self.format].inputs is not None:
            lines.append("who runs them rounds what they are multiplied with to 8 bits, too, with a scale for a token")
        reasons: dict[str, list[str]] = {}
        for name, why in self.kept.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"left as they are: {len(names)}, such as {names[0]}: {why}" for why, names in reasons.items()]
        return "\n".join(lines)


def quantize(
    source: str | Path,
    directory: str | Path,
    bits: int | None = None,
    group: int | None = None,
    scales: str = "mse",
    format: str = "pack-quantized",
) -> Quantised:
    """Write the checkpoint in `source` to `directory` with the matrices of its blocks as whole numbers of `bits`.

    Zeros stay zeros, and what is kept stays other than zero: every place is what it was. What lies on such a grid
    already, of a model pruned with `values="int4"`, stays bit for bit what it is; all else is rounded, each number by
    itself. Embeddings, head, norms and routers stay as they are. One matrix at a time is in memory.

    `directory` is written whole or not at all. The other files go along, `dsa_config.json` among them.

    Args:
        source (`str | Path`): a folder, dense or in an encoding of ours.
        directory (`str | Path`): where it goes.
        bits (`int`, *optional*): 4 (the default) or 8; of `int-quantized` 8.
        group (`int`, *optional*): columns that share a scale: 32, 64, 128 (the default), ... up to 4096, or 0 for all
            of a row; of `int-quantized` 0.
        scales (`str`, defaults to `"mse"`): how they are chosen, "mse" or "absmax".
        format (`str`, defaults to `"pack-quantized"`): of compressed-tensors: "pack-quantized", weights alone, or
            "int-quantized", whose inputs are rounded to 8 bits, too, by who runs it: int8 times int8.

    Raises:
        ValueError: a setting that is none, or none of the format; or no matrix can be quantised, and why.
        FileNotFoundError: `source` holds no weights in safetensors.
    """
    form = FORMATS[format]
    bits, group = form.bits[0] if bits is None else bits, form.groups[0] if group is None else group
    _check_settings(bits, group, scales, format)
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"No folder {source}.")
    if Path(directory).is_dir() and source.samefile(directory):
        raise ValueError(
            f"{source} would be replaced by itself with rounded weights, and what they were would be lost; name "
            "another folder to write."
        )
    shards = find_shards(source)
    for name in ("config.json", *shards.files):
        own_file(source / name, source)
    config = converted_config(read_json(source / "config.json"), DENSE, source)
    chosen, kept, ignored = _choose(source, held_in(shards).keys(), group)
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:3]) or "it has no nn.Linear"
        raise ValueError(f"Nothing of {source} can be quantised with a group of {group} ({why}); nothing was written.")
    others, left = other_files(shards)
    same, before, after = 0, 0, 0

    def on_grid(weight: Tensor) -> Grid:
        nonlocal same
        grid, was = _on_grid(weight, bits, group, scales)
        same += was
        return grid

    def fill(folder: Path) -> None:
        nonlocal before, after
        output.carry(source, others, folder)
        stated = {**config, "quantization_config": entry(format, bits, group, ignored)}
        write_text(folder / "config.json", json.dumps(stated, indent=2) + "\n")
        before, after = write_integers(shards, folder, chosen, on_grid, bits, group, form)

    with OutputFolder(directory) as output:
        output.require(sum((shards.folder / file).stat().st_size for file in shards.files))
        output.write(fill, rescue=False)  # the source is still there
    if left:
        logger.warning("Not taken along from %s: %s.", source, ", ".join(left))
    return Quantised(bits, group, len(chosen), same, kept, before, after, format)


def _check_settings(bits: int, group: int, scales: str, name: str) -> None:
    form = FORMATS[name]
    if bits not in form.bits:
        raise ValueError(f"Weights are quantised to {_choices(form.bits)} bits in {name}, got {bits!r}.")
    if group not in form.groups:
        raise ValueError(
            f"group={group} is no number of columns that may share a scale in {name}; use {_choices(form.groups)}, "
            "where 0 is all of a row."
        )
    if scales not in SCALES:
        raise ValueError(f"Scales are chosen by {' or '.join(SCALES)}, got {scales!r}.")


def _choices(numbers: Collection[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _choose(source: Path, held: Collection[str], group: int) -> tuple[set[str], dict[str, str], list[str]]:
    """The tensors that become whole numbers; those of blocks that do not, and why; the `nn.Linear` that stay."""
    model, _ = open_skeleton(source)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    architecture = find_architecture(model, skip_unprunable=True)
    chosen: set[str] = set()
    kept = dict(architecture.dense)
    for weight in architecture.weights:
        rows = weight.shape[1]
        if weight.module not in linear or weight.attribute != "weight":
            kind = type(model.get_submodule(weight.module)).__name__
            kept[weight.name] = f"it is of a {kind}, and compressed-tensors holds nn.Linear"
        elif weight.name not in held:
            kept[weight.name] = "the checkpoint has it under another name"
        elif rows % (group or 1):
            kept[weight.name] = f"its rows of {rows} do not divide by {group}; a smaller group may, or 0"
        else:
            chosen.add(weight.name)
    ignored = sorted(linear - {name.removesuffix(".weight") for name in chosen})
    tied = set(tied_names(model))
    for name in ignored:
        why = "it is the embedding, too" if f"{name}.weight" in tied else "it is no matrix of a block, or a router"
        kept.setdefault(f"{name}.weight", why)
    return chosen, kept, ignored


def _on_grid(weight: Tensor, bits: int, group: int, scales: str) -> tuple[Grid, bool]:
    """A grid for a weight, (rows, columns), with scales of its dtype, and whether the weight lay on it before."""
    found = grid_of(weight, bits)
    if found is not None and (found.group == group or not found.group or (group and found.group % group == 0)):
        # What shares a scale does so in its parts, too.
        places = [part.start // (found.group or weight.shape[1]) for part in groups_of(weight.shape[1], group)]
        same = Grid(found.numbers, found.scales[:, places], group)
        if torch.equal(same.scales.to(weight.dtype).float(), same.scales):
            return same, True
    grid = to_grid(weight, bits, group, scales)
    stored = grid.scales.to(weight.dtype).float()
    if not torch.equal(stored, grid.scales):  # float16 has fewer small numbers than bfloat16
        smallest = torch.finfo(weight.dtype).tiny * torch.finfo(weight.dtype).eps
        grid = to_scales(weight, stored.clamp(min=smallest), group, largest(bits), weight == 0)
    return grid, False
