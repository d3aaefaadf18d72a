"""Zeros are counted by one function: the same wherever weights are, at a price in proportion to their number."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import transformers
from peft import get_peft_model

from optimum_dsa import DSACallback, DSAConfig, SparseLoraConfig, find_architecture, prune
from optimum_dsa.pruning.zeros import count_zeros, counted, measured_allocation

from ..conftest import FAMILIES
from ..tiny import tiny_llama


def by_hand(model):
    return {weight.name: int((weight.tensor(model) == 0).sum()) for weight in find_architecture(model).weights}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_zeros_of_an_offloaded_model_are_those_that_it_has_in_memory(tiny, tmp_path, family):
    model = tiny(family)
    report = prune(model, None, DSAConfig(0.4, "magnitude", "er"))
    model.save_pretrained(tmp_path / "model")
    load = getattr(transformers, FAMILIES[family].auto).from_pretrained
    away = load(tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert count_zeros(away, find_architecture(away)) == by_hand(model) == count_zeros(model, find_architecture(model))
    assert counted(report, away).achieved == report.achieved


def test_a_look_is_given_every_mask():
    model, seen = tiny_llama(), {}
    prune(model, None, DSAConfig(0.4, "magnitude", "uniform"))
    zeros = count_zeros(
        model, find_architecture(model), lambda weight, tensor: seen.update({weight.name: tensor == 0})
    )
    assert {name: int(mask.sum()) for name, mask in seen.items()} == zeros == by_hand(model)


def test_a_model_with_adapters_has_the_units_and_zeros_that_it_has_without():
    model = tiny_llama()
    prune(model, None, DSAConfig(0.4, "magnitude", "uniform"))
    expected = measured_allocation(model, find_architecture(model), "matrix")
    inner = get_peft_model(model, SparseLoraConfig(r=2, target_modules="all-linear")).get_base_model()
    assert measured_allocation(inner, find_architecture(inner), "matrix") == expected


def python_calls(function):
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_a_log_of_a_model_with_adapters_costs_in_proportion_to_its_size():
    calls = {}
    for layers in (4, 8, 16):
        inner = tiny_llama(num_hidden_layers=layers)
        model = get_peft_model(inner, SparseLoraConfig(r=2, target_modules="all-linear"))
        callback, state = DSACallback(), SimpleNamespace(log_history=[])
        callback._hold(model.get_base_model())
        calls[layers] = python_calls(partial(callback.on_log, None, state, None, model=model, logs={}))
    assert calls[16] - calls[8] < 1.1 * 2 * (calls[8] - calls[4])
