"""Folders of adapters: loaded with the head that they were trained with, wherever that is, whole or not at all."""

import json
import re

import pytest
import torch
from peft import LoraConfig, RandLoraConfig, VeraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.checkpoint.load import load_model
from optimum_dsa.checkpoint.plan import plan
from optimum_dsa.model.adapters import has_adapters

from ..test_commands import run
from ..tiny import tiny_llama, tokens


TARGETS = {"target_modules": ["q_proj", "v_proj"]}
CONFIG = DSAConfig(0.5, "magnitude", "uniform")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BERT, ROBERTA = BertConfig(vocab_size=97, **SIZES), RobertaConfig(vocab_size=97, **SIZES)


def saved_adapter(model, place, config):
    """An adapter on `model`, of random numbers, in a folder of its own."""
    torch.manual_seed(1)
    made = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    made.save_pretrained(place)
    return made


@pytest.fixture
def base(tmp_path):
    """Saves a model, and loads what is there with the class given."""

    def make(model, loaded, **options):
        model.save_pretrained(tmp_path / "base")
        return loaded.from_pretrained(tmp_path / "base", **options)

    return make


def same(one, other, **options):
    with torch.no_grad():
        outputs = [model(input_ids=tokens(2), **options)[0] for model in (one, other)]
    return torch.equal(*outputs)


HEADS = {
    "SEQ_CLS": (BertForMaskedLM(BERT), BertForSequenceClassification, {"num_labels": 3}),
    "SEQ_CLS of a language model": (
        tiny_llama(),
        LlamaForSequenceClassification,
        {"num_labels": 3, "pad_token_id": 0},
    ),
    "SEQ_CLS with two layers": (RobertaForMaskedLM(ROBERTA), RobertaForSequenceClassification, {"num_labels": 5}),
    "TOKEN_CLS": (BertForMaskedLM(BERT), BertForTokenClassification, {"num_labels": 4}),
    "QUESTION_ANS": (BertForMaskedLM(BERT), BertForQuestionAnswering, {}),
    "FEATURE_EXTRACTION": (BertForMaskedLM(BERT), BertModel, {}),
}


@pytest.mark.parametrize("name", sorted(HEADS))
def test_the_base_has_the_head_that_the_adapter_was_trained_with(name, base, tmp_path):
    plain, head, options = HEADS[name]
    model = base(plain, head, **options)
    target = ["q_proj"] if "language" in name else ["query"]
    made = saved_adapter(model, tmp_path / "adapter", LoraConfig(target_modules=target, task_type=name.split(" ")[0]))
    pruner = DSAPruner.from_pretrained(tmp_path / "adapter")
    assert type(pruner.model) is type(made) and type(pruner.model.get_base_model()) is head
    brought = [key for key, _ in made.named_parameters() if "lora" in key or "modules_to_save" in key]
    state = pruner.model.state_dict()
    assert all(torch.equal(made.state_dict()[key], state[key]) for key in brought)
    pruner.prune(None, CONFIG)
    pruner.save_pretrained(tmp_path / "pruned")
    pruner.save_pretrained(tmp_path / "again")
    again = DSAPruner.from_pretrained(tmp_path / "again")
    assert again.verify().holds
    assert all(torch.equal(made.state_dict()[key], again.model.state_dict()[key]) for key in brought)


def test_a_task_that_no_class_has_is_refused_in_one_line(base, tmp_path):
    model = base(tiny_llama(), type(tiny_llama()))
    saved_adapter(model, tmp_path / "adapter", LoraConfig(**TARGETS))
    change(tmp_path / "adapter" / "adapter_config.json", task_type="QUESTION_ANS")
    change(tmp_path / "base" / "config.json", model_type="gemma", architectures=["GemmaForCausalLM"], head_dim=8)
    with pytest.raises(ValueError, match="an adapter for QUESTION_ANS, and transformers has no such class"):
        load_model(str(tmp_path / "adapter"))


def change(file, **facts):
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))


def test_an_adapter_of_another_model_is_refused_by_what_it_has(base, tmp_path):
    model = base(tiny_llama(), LlamaForSequenceClassification, num_labels=3)
    saved_adapter(model, tmp_path / "adapter", LoraConfig(**TARGETS, task_type="SEQ_CLS"))
    change(tmp_path / "adapter" / "adapter_config.json", task_type="CAUSAL_LM", modules_to_save=None)
    with pytest.raises(ValueError, match=r"of another model than LlamaForCausalLM: it has score.weight"):
        load_model(str(tmp_path / "adapter"))


def test_words_that_were_added_under_an_adapter_are_there_again(base, tmp_path):
    model = base(tiny_llama(), type(tiny_llama()))
    model.resize_token_embeddings(103)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    made = saved_adapter(model, tmp_path / "adapter", config)
    assert same(load_model(str(tmp_path / "adapter")), made)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_was_taken_out_of_its_base_is_not_taken_out_again(start, base, tmp_path):
    model = base(tiny_llama(), type(tiny_llama()))
    pruner = DSAPruner(saved_adapter(model, tmp_path / "adapter", LoraConfig(**TARGETS, init_lora_weights=start)))
    saved_twice(pruner, tmp_path)


ODD = {
    "vera": VeraConfig(**TARGETS),
    "randlora": RandLoraConfig(**TARGETS, r=4),
    "rows of the embedding": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
}


@pytest.mark.parametrize("name", sorted(ODD))
def test_the_base_is_saved_without_anything_that_the_adapter_brought(name, base, tmp_path, caplog):
    model = base(tiny_llama(), type(tiny_llama()))
    names = set(model.state_dict())
    pruner = DSAPruner(saved_adapter(model, tmp_path / "adapter", ODD[name]))
    saved_twice(pruner, tmp_path)
    assert set(load_model(str(tmp_path / "pruned")).state_dict()) == names
    assert "does not know" not in caplog.text


def saved_twice(pruner, place):
    """Prune, save the model, then its adapters, and hold against what is loaded again."""
    pruner.prune(None, CONFIG)
    pruner.save_pretrained(place / "pruned")
    pruner.save_pretrained(place / "again")
    assert same(load_model(str(place / "again")), pruner.model.eval())


def test_every_adapter_of_a_folder_is_loaded(base, tmp_path, caplog):
    made = get_peft_model(base(tiny_llama(), type(tiny_llama())), LoraConfig(target_modules=["q_proj"]))
    made.add_adapter("b", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    made.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    assert list(loaded.peft_config) == ["default", "b"] and loaded.active_adapter == "default"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in made.state_dict().items())
    assert "holds the adapters default, b; the first is active" in caplog.text


def test_a_base_is_found_from_any_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("dense")
    pruner = DSAPruner.from_pretrained("dense")
    pruner.prune(None, CONFIG)
    pruner.save_pretrained("pruned")
    pruner.model = get_peft_model(pruner.model, LoraConfig(**TARGETS))
    pruner.save_pretrained("adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert DSAPruner.from_pretrained(tmp_path / "adapter").verify().holds
    # one that PEFT has saved: beside the adapter
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="pruned")
    assert DSAPruner.from_pretrained(tmp_path / "adapter").verify().holds


def test_a_base_that_is_gone_is_named(base, tmp_path):
    saved_adapter(base(tiny_llama(), type(tiny_llama())), tmp_path / "adapter", LoraConfig(**TARGETS))
    change(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="gone")
    with pytest.raises(
        OSError, match=re.escape(f"{tmp_path / 'adapter'} holds an adapter on gone, which cannot be had")
    ):
        load_model(str(tmp_path / "adapter"))


def test_the_plan_for_an_adapter_is_that_for_its_base(base, tmp_path):
    saved_adapter(base(tiny_llama(), type(tiny_llama())), tmp_path / "adapter", LoraConfig(**TARGETS))
    found, expected = (plan(tmp_path / name, CONFIG, run_block=False) for name in ("adapter", "base"))
    assert found.phases["loading"]["weights"] == expected.phases["loading"]["weights"]


def test_the_command_prunes_the_dense_model_under_an_adapter(base, tmp_path, monkeypatch, capsys):
    saved_adapter(base(tiny_llama(), type(tiny_llama())), tmp_path / "adapter", LoraConfig(**TARGETS))
    options = ["-s", "0.5", "--method", "magnitude", "--allocation", "uniform", "-o", str(tmp_path / "out")]
    code, _, errors = run(monkeypatch, capsys, "prune", str(tmp_path / "adapter"), *options)
    assert code == 0, errors
    pruner = DSAPruner.from_pretrained(tmp_path / "out")
    assert pruner.verify().holds and not has_adapters(pruner.model)
