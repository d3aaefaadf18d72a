"""How many parameters a model has does not depend on where they are, nor on what is trained beside them."""

import pytest
from peft import LoraConfig, get_peft_model

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.model.parameters import count_parameters, weight_bytes

from .test_offload import PLACES, disk


TIED = ["gemma", "gpt2", "t5"]


def plain_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", *TIED])
def test_an_offloaded_model_has_as_many_as_in_memory(tiny, tmp_path, name, place):
    model = tiny(name)
    model.save_pretrained(tmp_path / "model")
    found = place(name, tmp_path / "model", tmp_path / "offload")
    assert count_parameters(model) == count_parameters(found) == plain_count(model)
    assert weight_bytes(found) == weight_bytes(model) == 4 * plain_count(model)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_what_is_written_of_an_offloaded_model_is_what_it_has(tiny, inputs, tmp_path, name):
    tiny(name).save_pretrained(tmp_path / "model")
    pruner = DSAPruner(disk(name, tmp_path / "model", tmp_path / "offload"))
    report = pruner.prune(inputs(name), DSAConfig(0.5))  # a forward pass parts the placeholders of tied weights
    assert report.parameters == plain_count(tiny(name))
    assert pruner.verify().parameters == report.parameters and pruner.verify().holds


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_adapters_do_not_count(tiny, name, options):
    model = tiny(name)
    expected = plain_count(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    assert plain_count(adapted) > expected == count_parameters(adapted) == count_parameters(adapted.get_base_model())


def test_weights_that_were_parted_count_twice(tiny):
    model = tiny("gemma")
    expected = plain_count(model) + model.lm_head.weight.numel()
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
    assert count_parameters(model) == expected
