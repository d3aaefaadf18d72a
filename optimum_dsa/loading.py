"""Models and tokenizers from a path or Hub id, by the class that the checkpoint names."""

from __future__ import annotations

import logging
from typing import Any

import transformers
from torch import nn


logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")


def load_model(path: str, **kwargs) -> nn.Module:
    """The model at `path` in its own architecture (language model, encoder, vision model, ...), for inference."""
    shared = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path, **shared)
    named = [getattr(transformers, name, None) for name in config.architectures or []]
    loader = next((cls for cls in named if cls is not None), None)
    if loader is None:
        loader = transformers.AutoModelForCausalLM
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
