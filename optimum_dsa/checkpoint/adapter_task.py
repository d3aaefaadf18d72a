"""What an adapter was trained for, and so with which head its base is loaded: the base's config.json may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from .shards import open_shard


# PEFT's task -> the Auto class that makes its head, and where transformers keeps what that loads. A language model,
# causal or of two stacks, is loaded as its config.json says: its class may also see or hear.
_TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    "FEATURE_EXTRACTION": ("AutoModel", "MODEL_MAPPING_NAMES"),
}
_LABELLED = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class AdapterTask:
    """What the files of an adapter say of the model that they belong to.

    Attributes:
        folder (`Path`): where they are.
        task (`str`, *optional*): PEFT's name of what it was trained for; `None` where it does not say.
        modules (`tuple[str, ...]`): the modules that it holds whole.
        shapes (`Mapping[str, tuple[int, ...]]`): of all that it holds, by names in the model.
    """

    folder: Path
    task: str | None
    modules: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def model_class(self, own: type, config: Any) -> type:
        """The class that loads the base, being `own` for its config.json alone; `config` gets the labels, in place.

        Raises:
            ValueError: transformers has none for a model of this type.
        """
        if self.task not in _TASKS:
            return own
        name, table = _TASKS[self.task]
        named = getattr(modeling_auto, table, {}).get(config.model_type)
        coded = name in (getattr(config, "auto_map", None) or {})
        if named is None and not coded:
            raise ValueError(
                f"{self.folder} holds an adapter for {self.task}, and transformers has no such class for a model of "
                f"the type {config.model_type!r}; load its base with the class that it was trained with."
            )
        labels = self._labels()
        if labels is not None and labels != getattr(config, "num_labels", labels):
            config.num_labels = labels
        known = (named,) if isinstance(named, str) else named or ()
        return own if own.__name__ in known else getattr(transformers, name)

    def _labels(self) -> int | None:
        """How many labels the head has that it brings: the fewest rows of a matrix there, as the last one has."""
        rows = [
            shape[0]
            for name, shape in self.shapes.items()
            if len(shape) == 2 and set(name.split(".")) & set(self.modules)
        ]
        return min(rows) if rows and self.task in _LABELLED else None

    def resize(self, model: nn.Module) -> None:
        """Give `model` as many words as the adapter has rows for, in place; their values come with it."""
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        name = next((name for name, module in model.named_modules() if module is embeddings), None)
        shape = self.shapes.get(f"{name}.weight")
        if embeddings is not None and shape and shape[0] != len(embeddings.weight):
            with torch.random.fork_rng(devices=()):  # new rows of a head that the adapter lacks are drawn
                model.resize_token_embeddings(shape[0], mean_resizing=False)


def task_of(folder: Path, weights: str, stated: Any) -> AdapterTask:
    """What the adapter in `folder`, whose configuration is `stated`, was trained for; of its `weights`, the header."""
    stated = stated if isinstance(stated, Mapping) else {}
    shapes = {}
    if (folder / weights).is_file():
        with open_shard(folder / weights, "np") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                shapes[name.removeprefix("base_model.model.")] = tuple(file.get_slice(name).get_shape())
    modules = stated.get("modules_to_save")
    modules = tuple(name for name in modules if isinstance(name, str)) if isinstance(modules, list) else ()
    task = stated.get("task_type")
    return AdapterTask(folder, task if isinstance(task, str) else None, modules, shapes)
