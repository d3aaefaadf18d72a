"""What a checkpoint lacks is never made up: a model's own weights are missed by name, a new head is said."""

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from optimum_dsa.checkpoint.load import load_model

from ..conftest import FAMILIES
from ..tiny import same_state, tiny_llama
from ..tiny_gguf import write_gguf


def without(folder, *names):
    """The folder, whose weights have the named tensors no more."""
    file = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name not in names}, file, {"format": "pt"})
    return str(folder)


BERT = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
LACKING = [
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.input_layernorm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
]


@pytest.mark.parametrize("options", [{}, {"device_map": {"": "disk"}}], ids=["memory", "disk"])
@pytest.mark.parametrize("name", LACKING)
def test_a_weight_that_is_missing_is_named(name, options, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"lacks {name} of its LlamaForCausalLM"):
        load_model(without(tmp_path, name), **options)


def test_blocks_that_only_the_configuration_has_are_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_llama(num_hidden_layers=5).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks model.layers.3.* and 15 more weights"):
        load_model(str(tmp_path))


def test_a_new_head_is_said_and_the_model_under_it_is_its_own(tmp_path, caplog):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = load_model(without(tmp_path, "lm_head.weight"))
    assert "has no weights for the head of its LlamaForCausalLM" in caplog.text and "lm_head.weight" in caplog.text
    assert same_state(loaded.model, model.model.state_dict())


def test_what_pretraining_needs_may_be_missing_without_a_word(tmp_path, caplog):
    BertModel(BERT).save_pretrained(tmp_path)
    load_model(without(tmp_path, "pooler.dense.weight", "pooler.dense.bias"))
    assert "head" not in caplog.text


def test_every_weight_of_a_new_classifier_is_a_head(tmp_path, caplog):
    BertForSequenceClassification(BERT).save_pretrained(tmp_path)
    load_model(without(tmp_path, "classifier.weight", "classifier.bias"))
    assert "classifier.bias, classifier.weight" in caplog.text


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_is_missing_of_what_was_saved(family, tiny, tmp_path, caplog):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))) is type(model)
    assert "has no weights for the head" not in caplog.text


def test_a_part_of_a_gguf_is_no_model(tmp_path):
    write_gguf(tmp_path / "m-00001-of-00002.gguf", lacks=("blk.1.ffn_up",))
    with pytest.raises(ValueError, match=r"m-00001-of-00002.gguf lacks model.layers.1.mlp.up_proj.weight .*in parts"):
        load_model(str(tmp_path / "m-00001-of-00002.gguf"))
