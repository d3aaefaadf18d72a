"""Quantised files of pruned models as dense folders, so that their zeros can be counted: GGUFs and packed numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..common.files import read_json
from ..pruning.configuration import CONFIG_NAME
from .forms import is_gguf
from .gguf_read import read_gguf
from .integers_shards import is_integers, restore


def countable(path: str, scratch: Path) -> tuple[str, str | None]:
    """Where the weights at `path` can be counted, and as what they are stored: `path` itself and `None` if there.

    Args:
        scratch: a folder to be made, where what is made dense goes.

    Raises:
        ValueError: a GGUF that was not written here, of a pruned model; packed numbers that are damaged, or others'.
    """
    if is_gguf(path) and Path(path).is_file():
        read_gguf(Path(path), scratch)
        return str(scratch), GGUF
    config = Path(path) / "config.json"
    if not config.is_file() or not is_integers(read_json(config)):
        return path, None
    restore(Path(path), scratch)
    for file in Path(path).iterdir():
        # the description, and code of a model's own
        if file.name == CONFIG_NAME or file.suffix == ".py":
            shutil.copyfile(file, scratch / file.name)
    return str(scratch), INTEGERS


GGUF, INTEGERS = "gguf", "integers"
