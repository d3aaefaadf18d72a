"""Models and tokenizers from a path or Hub id, by the class that the checkpoint names."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from .configuration import CONFIG_NAME
from .description import read_description
from .files import read_json
from .hub_file import hub_commit, hub_file
from .shards import check_size, count_weights, find_shards


logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
_FILE_OPTIONS = tuple(name for name in _HUB_OPTIONS if name != "trust_remote_code")

# what other libraries read, or pickles
_NO_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx"]


def load_model(path: str, **kwargs) -> nn.Module:
    """The model at `path` in its own architecture (language model, encoder, vision model, ...), for inference."""
    shared = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    folder = Path(path, kwargs.get("subfolder") or "")
    if (folder / "config.json").is_file():
        read_json(folder / "config.json")  # larger than any configuration: refused before transformers reads it
    # what is pruned is safetensors, and its index leads nowhere else
    shards = find_shards(folder) if (folder / CONFIG_NAME).is_file() else None
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path, **shared)
    named = [getattr(transformers, name, None) for name in config.architectures or []]
    loader = next((cls for cls in named if cls is not None), None)
    if loader is None:
        loader = transformers.AutoModelForCausalLM
    if shards is not None and shards.form == "dense" and loader in named:
        with torch.device("meta"):
            model = loader(copy.deepcopy(config))
        check_size(model, sum(count_weights(folder / file) for file in shards.files), path)
    return loader.from_pretrained(path, config=config, **kwargs).eval()


def load_tokenizer(source: Any, **kwargs) -> Any:
    """`source` itself if it is a tokenizer; else the one at that path or Hub id, `None` if there is none."""
    if source is None or not isinstance(source, str):
        return source
    shared = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **shared)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("No tokenizer at %s: %s", source, error)
        return None


def find_description(path: str, **kwargs) -> dict[str, Any] | None:
    """The content of the `dsa_config.json` beside the model at a path or Hub id; `None` where nothing was pruned.

    Raises:
        DescriptionError: it does not follow its schema.
    """
    if Path(path).is_dir():
        found = Path(path, kwargs.get("subfolder") or "", CONFIG_NAME)
        return read_description(found) if found.is_file() else None
    shared = {name: kwargs[name] for name in _FILE_OPTIONS if name in kwargs}
    found = hub_file(path, CONFIG_NAME, **shared)
    return None if found is None else read_description(found)


def find_commit(path: str, **kwargs) -> str | None:
    """The commit of the model at a Hub id; `None` for a folder, or where it is not known."""
    return hub_commit(path, **{name: kwargs[name] for name in _FILE_OPTIONS if name in kwargs})


def local_folder(path: str, revision: str | None = None) -> Path:
    """`path` if it is a folder; else a folder with the files of that Hub model, in the cache."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(huggingface_hub.snapshot_download(path, revision=revision, ignore_patterns=["*/*", *_NO_WEIGHTS]))
    except (huggingface_hub.errors.HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{path} is neither a folder nor a model that the Hub gives: {error}") from None
