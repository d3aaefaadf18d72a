"""Models with adapters: the model under them is pruned and saved, and they are as they were."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft import inject_adapter_in_model as inject
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_dsa import DataConfig, DSACallback, DSAConfig, DSAPruner, find_architecture, prune
from optimum_dsa.model.adapters import has_adapters, without_adapters

from ..tiny import bos_tokenizer, tiny_llama, tokens


TARGETS = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "lora": LoraConfig(**TARGETS, init_lora_weights=False),
    "dora": LoraConfig(**TARGETS, use_dora=True, init_lora_weights=False),
    "loha": LoHaConfig(**TARGETS, init_weights=False),
    "a module that is trained whole": LoraConfig(target_modules=["q_proj"], modules_to_save=["v_proj", "lm_head"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}
CONFIG = DSAConfig(0.5, "sparsegpt", "owl", granularity="matrix")


def made(name, model=None):
    torch.manual_seed(1)
    return get_peft_model(model or tiny_llama(), ADAPTERS[name])


def plain():
    model = tiny_llama()
    return model, prune(model, tokens(), CONFIG)


def equal(states):
    one, other = states
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_the_base_is_pruned_and_saved_as_it_would_be_alone(name, tmp_path, caplog):
    expected, report = plain()
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items() if ".base_layer." not in key}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    pruner = DSAPruner(model)
    found = pruner.prune(tokens(), CONFIG)
    assert found.allocation == report.allocation and found.achieved == report.achieved
    assert found.parameters == report.parameters and pruner.verify().holds
    pruner.save_pretrained(tmp_path / "base")
    assert "without its adapters" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert equal((loaded.state_dict(), expected.state_dict()))
    assert DSAPruner.from_pretrained(tmp_path / "base").verify().holds
    # the adapters: their weights, whether they are on, and what is trained
    for key, value in model.state_dict().items():
        if "lora" in key or "hada" in key or "ia3" in key or "modules_to_save" in key or "prompt" in key:
            assert torch.equal(value, before[key]), key
    assert flags == {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    # saved once more it is they that are written, for the base that is pruned
    pruner.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))
    given = {"input_ids": tokens(2)}
    torch.testing.assert_close(again(**given).logits, model(**given).logits)


def test_adapters_in_the_layers_of_a_model_are_left_alone(tmp_path):
    expected, report = plain()
    model = inject(LoraConfig(**TARGETS), tiny_llama())
    assert has_adapters(model)
    pruner = DSAPruner(model)
    assert pruner.prune(tokens(), CONFIG).achieved == report.achieved
    for folder in ("once", "twice"):
        pruner.save_pretrained(tmp_path / folder)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert equal((loaded.state_dict(), expected.state_dict()))


@pytest.mark.contract
def test_adapters_that_transformers_attached_are_left_alone(tmp_path):
    expected, _ = plain()
    model = inject(LoraConfig(**TARGETS), tiny_llama())
    # what `add_adapter` notes, of which this PEFT may be too old
    model._hf_peft_config_loaded, model.peft_config = True, {"default": LoraConfig(**TARGETS)}
    pruner = DSAPruner(model)
    pruner.prune(tokens(), CONFIG)
    pruner.save_pretrained(tmp_path)
    assert model._hf_peft_config_loaded
    assert equal((AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), expected.state_dict()))


def test_the_folder_of_an_adapter_is_pruned_as_its_base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    made("lora", AutoModelForCausalLM.from_pretrained(tmp_path / "dense")).save_pretrained(tmp_path / "adapter")
    pruner = DSAPruner.from_pretrained(tmp_path / "adapter")
    pruner.prune(tokens(), CONFIG)
    pruner.save_pretrained(tmp_path / "pruned")
    expected, _ = plain()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert equal((loaded.state_dict(), expected.state_dict()))


def test_an_adapter_that_is_merged_and_can_be_taken_out_is_refused_before_work():
    model = made("lora")
    model.merge_adapter()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="merged into its weights and can be taken out"):
        DSAPruner(model).prune(tokens(), CONFIG)
    assert equal((model.state_dict(), before))


def test_without_adapters_a_model_runs_as_its_base_and_is_then_as_it_was():
    model, given = made("a module that is trained whole"), {"input_ids": tokens(2)}
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
        expected, own = tiny_llama()(**given).logits, model(**given).logits
        with pytest.raises(KeyError), without_adapters(model):
            assert torch.equal(model(**given).logits, expected)
            raise KeyError
        assert torch.equal(model(**given).logits, own) and not torch.equal(own, expected)


def test_names_given_by_the_user_are_those_without_adapters():
    model = made("lora")
    report = DSAPruner(model).prune(tokens(), DSAConfig(0.5, exclude=("*.q_proj.weight",)))
    assert "model.layers.0.self_attn.q_proj.weight" in report.dense
    _, first = plain()
    again = DSAPruner(made("lora")).prune(tokens(), DSAConfig(0.5, "wanda", first.allocation))
    assert again.achieved == first.achieved


@pytest.mark.parametrize("name", ["a module that is trained whole", "dora"])
def test_the_callback_counts_the_base_alone(name, tmp_path):
    model = made(name)
    size = sum(weight.size for weight in find_architecture(tiny_llama()).weights)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens(4)])
    callback = DSACallback(DSAConfig(0.5, "wanda", "uniform"), tokens()).attach(trainer)
    trainer.train()
    assert sum(callback.report.allocation.sizes.values()) == size and callback.report.sparsity == 0.5


def test_an_adapters_folder_has_its_bases_tokenizer(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    bos_tokenizer().save_pretrained(tmp_path / "base")
    made("lora", AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    pruner = DSAPruner.from_pretrained(tmp_path / "adapter")
    assert pruner.tokenizer("1 2").input_ids == bos_tokenizer()("1 2").input_ids
    pruner.prune([" ".join(map(str, range(80)))] * 4, DSAConfig(0.5, "wanda", data=DataConfig(4)))
    pruner.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
