"""The files of a checkpoint's folder, which a stranger may have made: their names, and no link that leads out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants

from .manifest import files_in


WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.bpe",
    "bpe.codes",
    "encoder.json",
    "vocab-*.json",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
OTHERS = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "*.py",
    "README.md",
    *("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*"),
    "requirements.txt",
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)

_REPOSITORY = re.compile(r"(models|datasets|spaces)--")  # the name of a repository's folder in the Hub's cache


def own_file(path: str | Path, folder: str | Path) -> Path:
    """`path`, a file that lies in `folder`, or a link to one that does.

    Links into the Hub's cache, to which a downloaded folder belongs, are followed.

    Raises:
        ValueError: it is a link out of the folder, or neither a file nor a link to one: it could bring along whatever
            its target holds, such as a key.
    """
    path = Path(path)
    target = path.resolve()
    if not _is_inside(target, Path(folder).resolve()):
        raise ValueError(
            f"{path} is a link out of its folder, to {target}: what is there would be copied or sent as a part of the "
            "model. Replace the link by the file that should be here."
        )
    if not target.is_file():
        raise ValueError(f"{path} is no file, and leads to none; remove it or replace it by what should be here.")
    return path


def own_files(folder: str | Path) -> Iterator[tuple[str, Path]]:
    """Name in the folder, with slashes, and path of everything in `folder` and the folders in it, sorted by name.

    A link to a folder is not entered: it comes as one entry. Nothing is checked; `own_file` does.
    """
    yield from ((name, Path(folder, name)) for name in files_in(Path(folder)))


def is_part(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name in a folder, with slashes, is one of those that the patterns mean."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def check_read_files(folder: str | Path) -> None:
    """Raise `ValueError` where a file that is saved again once it was read, such as a tokenizer's, is a link out.

    Weights are not looked at: people keep them on other disks. They are when they are sent or converted.
    """
    for pattern in (*TOKENIZER, *OTHERS):
        for path in Path(folder).glob(pattern):
            if path.is_file():
                own_file(path, folder)


def _is_inside(target: Path, folder: Path) -> bool:
    return any(target.is_relative_to(root) for root in (folder, *_blobs(folder))) or _is_cached(target)


def _blobs(folder: Path) -> list[Path]:
    """Where a snapshot of the Hub's cache has its files: its repository's blobs, and those that repositories share."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and _REPOSITORY.match(repository.name):
            return [repository / "blobs", repository.parent / "blobs"]
    return []


def _is_cached(target: Path) -> bool:
    """Whether a file is a blob of this computer's cache; links to them were what `local_dir` was once made of."""
    cache = Path(constants.HF_HUB_CACHE).resolve()
    if not target.is_relative_to(cache):
        return False
    parts = target.relative_to(cache).parts
    return parts[:1] == ("blobs",) or (len(parts) > 2 and bool(_REPOSITORY.match(parts[0])) and parts[1] == "blobs")
