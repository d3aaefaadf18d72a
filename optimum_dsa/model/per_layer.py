"""Models whose layers have widths of their own, made known to transformers: its Auto classes then load them.

Nothing of it is imported before a checkpoint asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig


TYPE = "dsa_"  # before the type of a family; modeling_per_layer.TYPE, which would import much
# Auto class -> the table of transformers in which a family's class for it stands.
_TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


class AnyFamily:
    """Stands for the configurations of all families, none of which is made before it is asked for."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], **kwargs) -> Any:
        """The configuration that a `config.json` holds, of its family's class."""
        return known_family(content["model_type"].removeprefix(TYPE)).from_dict(dict(content), **kwargs)


def known_family(family: str) -> type:
    """The configuration's class for layers that differ, of a `model_type`; its models' classes are registered."""
    made = importlib.import_module(".modeling_per_layer", __package__)
    config = made.class_named(made.PREFIX + CONFIG_MAPPING[family].__name__)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, name in classes_of(family).items():
        getattr(importlib.import_module("transformers"), auto).register(config, made.class_named(name), exist_ok=True)
    return config


def classes_of(family: str) -> dict[str, str]:
    """Auto class -> name of a family's class for layers that differ."""
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    made = importlib.import_module(".modeling_per_layer", __package__)
    found = {auto: getattr(tables, table).get(family) for auto, table in _TABLES.items()}
    # One that stands for several has no one class that loads it.
    return {auto: made.PREFIX + name for auto, name in found.items() if isinstance(name, str)}


def is_per_layer(stated: Mapping[str, Any]) -> bool:
    """Whether the content of a `config.json` speaks of a model whose layers differ."""
    return str(stated.get("model_type", "")).startswith(TYPE)


def per_layer_class(config: Any, where: Any, options: Mapping[str, Any] | None = None) -> type:
    """The class that loads such a checkpoint: that of its `architectures`, else the first of its family's.

    Raises:
        ValueError: its `architectures` names another model's class.
    """
    known = list(classes_of(config.model_type.removeprefix(TYPE)).values())
    name = (config.architectures or known or [""])[0]
    made = importlib.import_module(".modeling_per_layer", __package__)
    try:
        found = made.class_named(name)
        if not issubclass(found.config_class, type(config)):
            raise AttributeError
    except AttributeError:
        raise ValueError(
            f"The config.json of {where} names {name!r} in architectures, and its model_type is "
            f"{config.model_type!r}, whose classes are {', '.join(known)}; one of both is wrong."
        ) from None
    return found


def register() -> None:
    """Have transformers know every family's type; a second call changes nothing."""
    for family in list(CONFIG_MAPPING):
        if not family.startswith(TYPE) and f"{TYPE}{family}" not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(f"{TYPE}{family}", AnyFamily)


register()
