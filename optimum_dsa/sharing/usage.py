"""How others load a model that was pushed: the class, what prepares its inputs, and what the Hub calls its task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from ..model.own_code import AUTO_MODEL, code_map


# Class of transformers' Auto classes -> the task's name on the Hub. A model may fit several: the first is taken.
TASKS = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": None,
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForDepthEstimation": "depth-estimation",
}
_LAST = ("AutoModelForPreTraining", "AutoModelForTextEncoding", "AutoModelForMultimodalLM", AUTO_MODEL, "AutoBackbone")
_OTHER_NAMES = {"MODELFORSEQTOSEQCAUSALLM": "AutoModelForSeq2SeqLM"}


@dataclass(frozen=True)
class Usage:
    """What a card's code is made of.

    Attributes:
        loader (`str`): the class of transformers that loads the model as the class that was saved.
        task (`str`): on the Hub; `None` where none is known.
        trusted (`bool`): whether the model brings code that has to be trusted.
        inputs (`str`): the class that prepares its inputs; `None` where no file for one lies beside the model.
    """

    loader: str
    task: str | None = None
    trusted: bool = False
    inputs: str | None = None

    @property
    def options(self) -> str:
        """Further arguments of the loaders, as code."""
        return ", trust_remote_code=True" if self.trusted else ""


def usage(model_config: Any, files: Iterable[str] = ()) -> Usage:
    """How the model of a `config.json`'s content is loaded, with these files beside it."""
    config = model_config if isinstance(model_config, Mapping) else {}
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    files = list(files)
    inputs = "AutoTokenizer" if any(file.startswith("tokenizer") for file in files) else None
    if any(fnmatch(file, "*processor_config.json") for file in files):
        inputs = "AutoProcessor"
    try:
        code = {key: value for key, value in code_map(config, "").items() if key.startswith(AUTO_MODEL)}
    except ValueError:
        code = {}
    if code:
        known = [key for key in code if hasattr(transformers, key)]  # a stranger's text goes into no code of ours
        own = [key for key in known if code[key].endswith(f".{name}")]
        key = min(own or known, key=_rank, default=AUTO_MODEL)
        return Usage(key, TASKS.get(key), True, inputs)
    found = min(_auto_classes(name, config.get("model_type")), key=_rank, default=None)
    if found is None:
        # Some classes are in no table: they are loaded by their own name.
        made = getattr(transformers, name, None) if name else None
        found = name if isinstance(made, type) and issubclass(made, transformers.PreTrainedModel) else AUTO_MODEL
    return Usage(found, TASKS.get(found), False, inputs)


def _rank(auto: str) -> tuple[bool, int]:
    order = [*TASKS]
    return auto in _LAST, order.index(auto) if auto in order else len(order)


def _auto_classes(name: str, model_type: Any) -> Iterator[str]:
    """The Auto classes that load a model of this type as the class of this name."""
    autos = {auto[4:].upper(): auto for auto in vars(modeling_auto) if auto.startswith("Auto")} | _OTHER_NAMES
    for table, types in vars(modeling_auto).items():
        if not (table.startswith("MODEL_") and table.endswith("MAPPING_NAMES")):
            continue
        names = types.get(model_type) if isinstance(types, Mapping) else None
        auto = autos.get(table.removesuffix("_MAPPING_NAMES").replace("_", ""))
        if auto and name and name in ((names,) if isinstance(names, str) else names or ()):
            yield auto
