"""Pruned models out of the GGUFs that were written of them: dense folders, to count their zeros in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.files import write_text
from ..common.installation import how_to_install
from ..common.shard_writer import ShardWriter
from ..pruning.configuration import CONFIG_NAME
from .convert import converted_config
from .encodings import DENSE
from .gguf_families import family_of
from .gguf_file import KEYS, plan
from .load import read_configuration
from .skeleton import open_skeleton


def read_gguf(path: Path, folder: Path) -> None:
    """Write the checkpoint that the GGUF at `path` was made of to `folder`, with the numbers that the file holds.

    Weights are bfloat16, in which no number becomes zero; one tensor at a time is in memory.

    Raises:
        ValueError: it was not written of a pruned model here, is damaged, or the package gguf is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"A GGUF is read by the package gguf, which is not installed: {how_to_install('gguf')}."
        ) from error
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # whatever a damaged file ends in
        raise ValueError(f"The GGUF {path} cannot be read ({error}); write it again.") from error
    said = {name: reader.get_field(key) for name, key in KEYS.items()}
    if None in said.values():
        raise ValueError(
            f"{path} says nothing of pruning; of a pruned folder, `optimum-cli dsa convert --to gguf` writes one that "
            "does."
        )
    config, description, names = (said[name].contents() for name in ("config", "description", "names"))
    folder.mkdir(parents=True, exist_ok=True)
    stated = {**converted_config(json.loads(config), DENSE, path), "dtype": "bfloat16"}
    write_text(folder / "config.json", json.dumps(stated))
    _write_weights(reader, path, folder, dict.fromkeys(names))
    write_text(folder / CONFIG_NAME, description)


def _write_weights(reader: Any, path: Path, folder: Path, names: dict[str, None]) -> None:
    import gguf

    config = read_configuration(str(folder), {})
    held = {tensor.name: tensor for tensor in reader.tensors}
    # Shapes are the file's own: only which of its tensors a name is in has to be found out, and what is of no size.
    shapes = {name: tuple(tensor.shape) for name, tensor in open_skeleton(folder)[0].state_dict().items()}
    _, parts = plan(config, family_of(config, path), {name: shapes.get(name, ()) for name in names})
    missing = [part.called for part in parts if part.called not in held]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}; write it again.")
    written = [name for part in parts for name in part.names]
    # Of a layer without attention a file has not even the norm, and nothing is asked of that.
    within = f"{getattr(config, 'per_layer_blocks', None)}."
    absent = [name for name in names if name in shapes and name not in written and name.startswith(within)]
    with ShardWriter(folder / "model.safetensors", [*written, *absent], None) as writer:
        for name in absent:
            writer.add(name, torch.ones(shapes[name], dtype=torch.bfloat16))
        for part in parts:
            tensor = held[part.called]
            shape = [int(size) for size in reversed(tensor.shape)]
            numbers = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
            for name, found in zip(part.names, part.undo(torch.from_numpy(numbers))):
                writer.add(name, found.bfloat16())
