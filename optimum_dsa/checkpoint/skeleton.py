"""A checkpoint's model without its weights: enough to know every size, in no memory and no time."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model.own_code import check_trusted
from .forms import located
from .layouts import layout_of
from .limits import check_counts, within
from .load import contents_of, explained, read_configuration, stated_in, weights_of


# Settings of a configuration that count blocks, in one stack or in the two of an encoder-decoder.
_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_VOCABULARY = 512  # of a model that is made to be timed: its text means nothing


def open_skeleton(path: str | Path, dtype: str = "auto", **options) -> tuple[nn.Module, torch.dtype]:
    """The model at a path or Hub id with its parameters on the device "meta", and the type its weights are loaded in.

    A folder with nothing but a `config.json` will do, and of the Hub nothing else is downloaded.

    Args:
        options (`dict`): of `from_pretrained`; those that say where the checkpoint is are used (`revision`, ...).

    Raises:
        ValueError: its `config.json` cannot be a model's, or asks for more than the checkpoint holds.
        OSError: there is none.
    """
    path, options = located(weights_of(str(path)), options)
    made, config, contents = _read(path, options)
    with within(contents, path), explained(f"The model at {path} cannot be made"), torch.device("meta"):
        model = _made(made, config, options)
    stated = getattr(config, "dtype", None)
    plain = torch.float32 if not isinstance(stated, torch.dtype) else stated
    return model.eval(), plain if dtype == "auto" else getattr(torch, dtype)


def sample_model(path: str | Path, dtype: torch.dtype, device: str, blocks: int = 2, **options) -> nn.Module:
    """A model of so many blocks of the sizes of those at `path`, with random weights and few words, to be timed."""
    path, options = located(weights_of(str(path)), options)
    made, config, _ = _read(path, options)
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for part in {id(config): config, id(text): text}.values():
        for name in _COUNTS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(blocks, getattr(part, name)))
        if isinstance(getattr(part, "layer_types", None), list):
            _set(part, "layer_types", part.layer_types[:blocks])
        if isinstance(getattr(part, "vocab_size", None), int):
            _set(part, "vocab_size", min(part.vocab_size, _VOCABULARY))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            _set(part, name, None, 0)
    with explained(f"A block of {path} cannot be made alone"):
        model = _made(made, config, options).to(device=device, dtype=dtype)
    return model.eval()


def _set(part: Any, name: str, *values: Any) -> None:
    """Set a setting to the first of `values` that its class takes; as it is where that finds it by itself."""
    for value in values:
        # A property without a setter, or a class that checks: their errors have no common class.
        with suppress(Exception):
            setattr(part, name, value)
            return


def _read(path: str, options: dict[str, Any]) -> tuple[type, Any, Any]:
    """The class of the model at `path`, its configuration, and what its weights hold where they are in a folder."""
    folder = Path(path, options.get("subfolder") or "")
    gguf = bool(options.get("gguf_file"))
    stated = {} if gguf else stated_in(path, folder, options)
    # Of the Hub, the weights would have to be downloaded to be counted.
    contents = contents_of(path, folder, stated, options) if folder.is_dir() and not gguf else None
    check_counts(stated, contents, path)
    check_trusted(stated, path, bool(options.get("trust_remote_code")))
    config = read_configuration(path, options)
    return layout_of(stated).model_class(config, path, options), config, contents


def _made(made: type, config: Any, options: dict[str, Any]) -> nn.Module:
    # The classes that choose a class by the configuration are not made themselves.
    if hasattr(made, "from_config"):
        return made.from_config(config, trust_remote_code=bool(options.get("trust_remote_code")))
    return made(config)
