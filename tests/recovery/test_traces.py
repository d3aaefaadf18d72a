"""A recovered model shows no trace of how its training saved memory."""

import copy
import json

import pytest
import torch

from optimum_dsa import DSAPruner
from optimum_dsa.recovery.trainer import DivergedError

from .adapters.test_peft_method import sparse_llama
from .test_recover import regular, small


def traces(model):
    """What saving memory changes of a model: its settings, its hooks, and which modules forget activations."""
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules() if module._forward_hooks}
    forgets = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
    return model.config.to_dict(), model.generation_config.to_dict(), hooks, forgets, model.is_gradient_checkpointing


@pytest.mark.parametrize("method", ["full", "sparse-lora"])
def test_checkpointing_leaves_nothing_behind(method, tmp_path):
    model = sparse_llama(sparsity=0.6)
    before = copy.deepcopy(traces(model))
    pruner = DSAPruner.from_pretrained(model)
    pruner.recover(regular(), small(method=method, gradient_checkpointing=True, steps=2, eval_steps=2))
    assert traces(pruner.model) == before and pruner.model.config.use_cache
    pruner.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
    embedded = pruner.model.get_input_embeddings()(torch.tensor([1]))
    assert embedded.requires_grad  # of a parameter that is trained, with no hook that asks for it
    pruner.model.requires_grad_(False)
    assert not pruner.model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_what_was_on_before_stays_on_and_a_failed_training_leaves_nothing_either():
    """Siblings: a model that its owner trains with checkpointing, and a training that ends in the middle."""
    model = sparse_llama(sparsity=0.6)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    DSAPruner.from_pretrained(model).recover(regular(), small(gradient_checkpointing=True, steps=2, eval_steps=2))
    assert model.is_gradient_checkpointing and model.config.use_cache is False
    model = sparse_llama(sparsity=0.6)
    before = copy.deepcopy(traces(model))
    with pytest.raises(DivergedError):
        asked = small(method="full", gradient_checkpointing=True, learning_rate=1e30, steps=4)
        DSAPruner.from_pretrained(model).recover(regular(), asked)
    assert traces(model) == before


def test_settings_inside_settings_are_given_back_too(tiny):
    from optimum_dsa.recovery.recover import _left_as_found

    model = tiny("llava")
    with _left_as_found(model):
        model.config.text_config.use_cache = model.config.use_cache = False
        model.config.text_config.added = 1
    assert model.config.text_config.use_cache is True and not hasattr(model.config.text_config, "added")
