"""The class of the model that a checkpoint names: one of transformers' model classes, and nothing else it exports.

A checkpoint that brings its own code is loaded by that, where its code is trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from .own_code import AUTO_MODEL, code_map, own_class


logger = logging.getLogger(__name__)

# Auto class -> where transformers keeps the model types that it loads.
_TABLES = {
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}


def model_class(config: Any, where: str | Path, options: Mapping[str, Any] | None = None) -> type:
    """The class whose `from_pretrained` loads the checkpoint at `where`.

    With `trust_remote_code`, the class that its `auto_map` names, whatever transformers has under that name. Else the
    first of `architectures` that transformers has; where it has none of them, the Auto class for its type.

    Args:
        options (`Mapping[str, Any]`, *optional*): of `from_pretrained`; those that say where the code is, and whether
            it is trusted, are looked at.

    Raises:
        ValueError: a name there that is no model class of transformers, or of another model than `config` describes;
            or own code that is not trusted or cannot be run.
    """
    options = options or {}
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"The config.json of {where} has architectures={names!r:.80}; expected a list of names.")
    code = {key: value for key, value in code_map(config, where).items() if key.startswith(AUTO_MODEL)}
    if code and options.get("trust_remote_code"):
        return own_class(code, names, where, options)
    found = _of_transformers(config, names, where)
    if code:
        # transformers takes its own class without a word, and its numbers may not be the model's.
        logger.warning(
            "%s brings its own code (%s), which is not run: transformers' %s is loaded instead. "
            "trust_remote_code=True (--trust-remote-code) runs it.",
            where,
            ", ".join(sorted(set(code.values()))),
            found.__name__,
        )
    return found


def _of_transformers(config: Any, names: list[str] | tuple[str, ...], where: str | Path) -> type:
    """The first of `names` that transformers has; where it has none of them, what its type is loaded as."""
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            _check(found, name, config, where)
            return found
    found = _by_type(config)
    if names or found is not transformers.AutoModelForCausalLM:  # which is what most are
        said = f"architectures={list(names)!r:.80}, none of which transformers has" if names else "no architectures"
        logger.warning("The config.json of %s has %s: it is loaded with %s.", where, said, found.__name__)
    return found


def _by_type(config: Any) -> type:
    """The Auto class that loads the whole of a model whose class nobody names.

    A causal language model is not the whole of one that has an encoder: only its decoder would be loaded.
    """
    wanted = ["AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel"]
    if getattr(config, "is_encoder_decoder", False):
        wanted = ["AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", *wanted]
    elif not getattr(config, "is_decoder", False):
        wanted.insert(0, "AutoModelForMaskedLM")
    for name in wanted:
        if getattr(config, "model_type", None) in getattr(modeling_auto, _TABLES[name], {}):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def _check(found: Any, name: str, config: Any, where: str | Path) -> None:
    model_type = getattr(config, "model_type", None)
    registered = set(_registered(name))
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        why = "is no model class of transformers"
        if registered:  # what stands in its place raises when it is used
            why = "needs a library that is not installed"
        raise ValueError(
            f"The config.json of {where} names {name!r} in architectures, which {why}; name the class that the "
            "checkpoint was saved from."
        )
    # A base of model classes has no forward of its own; a few models that only generate have none either.
    if found is transformers.PreTrainedModel or (found.forward is nn.Module.forward and not registered):
        raise ValueError(
            f"The config.json of {where} names {name!r} in architectures, which is only the base of model classes; "
            "name the class that the checkpoint was saved from."
        )
    expected = found.config_class
    if not (isinstance(expected, type) and isinstance(config, expected)) and model_type not in registered:
        raise ValueError(
            f"The config.json of {where} names {name!r} in architectures, and its model_type is {model_type!r}, which "
            "that class does not load; one of both is wrong."
        )


def _registered(name: str) -> Iterator[str]:
    """The model types for which an Auto class takes the class of this name."""
    # No one table has all classes: each task of the Auto classes has its own.
    for table, types in vars(modeling_auto).items():
        if table.startswith("MODEL_") and table.endswith("MAPPING_NAMES"):
            for model_type, names in types.items():
                if name in ((names,) if isinstance(names, str) else names):
                    yield model_type
