"""A card's code loads the class that was saved."""

from __future__ import annotations

import json

import pytest
import transformers

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.sharing.usage import Usage, usage

from ..conftest import FAMILIES
from ..own_code import own_code
from ..tiny import tiny_llama
from .common import card, push


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = {
    transformers.BertForTokenClassification: "token-classification",
    transformers.BertForQuestionAnswering: "question-answering",
    transformers.BertForSequenceClassification: "text-classification",
    transformers.BertForMultipleChoice: "multiple-choice",
    transformers.BertModel: None,
    transformers.BertForPreTraining: None,
    transformers.BertLMHeadModel: "text-generation",
    transformers.LlamaForTokenClassification: "token-classification",
    transformers.LlamaForQuestionAnswering: "question-answering",
    transformers.Wav2Vec2ForCTC: "automatic-speech-recognition",
    transformers.CLIPModel: "zero-shot-image-classification",
    transformers.WhisperForCausalLM: "text-generation",
}


def loaded_by(row: Usage, config) -> type:
    """The class that the card's loader makes of a configuration."""
    loader = getattr(transformers, row.loader)
    return type(loader.from_config(config)) if row.loader.startswith("Auto") else loader


def content(config, made: type) -> dict:
    return {**json.loads(config.to_json_string()), "architectures": [made.__name__]}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_loaded_as_itself(family, tiny):
    model = tiny(family)
    row = usage(content(model.config, type(model)))
    assert loaded_by(row, model.config) is type(model)
    assert row.loader.removeprefix("Auto") != row.loader and not row.trusted


@pytest.mark.parametrize("made", KINDS, ids=lambda made: made.__name__)
def test_every_kind_is_loaded_as_itself(made):
    config = made.config_class()
    config = made.config_class(**{name: value for name, value in SMALL.items() if hasattr(config, name)})
    row = usage(content(config, made))
    assert row.task == KINDS[made]
    loader = getattr(transformers, row.loader)
    assert loader is made or made.__name__ in str(loader._model_mapping[type(config)])


@pytest.mark.parametrize("config", [None, {}, {"architectures": "x"}, {"architectures": [7]}, {"auto_map": 7}])
def test_of_what_is_no_configuration_nothing_is_known(config):
    assert usage(config) == Usage("AutoModel")


def test_names_from_a_strangers_file_are_in_no_code():
    for name in ('AutoModel"; import os', "pipeline", "PretrainedConfig", "set_seed", "AutoModelForNothing"):
        stated = {"architectures": [name], "auto_map": {name: "code.Name"}}
        assert usage({"architectures": [name]}).loader == "AutoModel"
        assert usage({**stated, "auto_map": {f"AutoModel{name}": "code.Name"}}).loader == "AutoModel"


@pytest.mark.parametrize(
    "files,inputs",
    [
        (["tokenizer.json"], "AutoTokenizer"),
        (["tokenizer_config.json", "preprocessor_config.json"], "AutoProcessor"),
        (["preprocessor_config.json"], "AutoProcessor"),
        (["config.json"], None),
    ],
)
def test_what_prepares_inputs_is_what_lies_there(files, inputs):
    assert usage({}, files).inputs == inputs


@pytest.mark.usefixtures("modules")
def test_a_card_trusts_code_where_the_model_needs_it(hub, tmp_path):
    pruner = DSAPruner.from_pretrained(own_code(tmp_path / "own"), trust_remote_code=True)
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    push(tmp_path / "out")
    text = card(hub).text
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny", dtype="auto", trust_remote_code=True)' in text
    assert 'AutoTokenizer.from_pretrained("me/tiny", trust_remote_code=True)' in text
    assert "--trust-remote-code" in text
    assert {"modeling_halves.py", "halves.py"} <= hub.content("me/tiny").keys()


def test_a_card_loads_a_processor_where_there_is_one(hub, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    pruner = DSAPruner.from_pretrained(tmp_path / "base")
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    push(tmp_path / "out")
    assert 'processor = AutoProcessor.from_pretrained("me/tiny")' in card(hub).text
