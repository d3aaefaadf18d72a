"""What a structure costs is what the model has less of without it, as PyTorch counts it."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optimum_dsa import find_architecture
from optimum_dsa.pruning.structured.slicing import cut_out
from optimum_dsa.pruning.structured.structures import find_structures
from optimum_dsa.pruning.structured.widths.costs import COSTS

from ..families import FAMILIES, batch_of


LENGTH = 12


def flops(model, batch):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops() // LENGTH


def cache_bytes(model, batch):
    layers = model(**batch, use_cache=True).past_key_values.layers
    return sum(value.nbytes for layer in layers for value in (layer.keys, layer.values)) // LENGTH


@pytest.mark.parametrize("family", ["Llama", "Llama with one head of keys", "GPT2"])
def test_a_structure_costs_what_is_less_without_it(family):
    model, batch = FAMILIES[family][0](), batch_of(family, length=LENGTH)
    architecture = find_architecture(model)
    units = find_structures(model, architecture, batch).structures
    costs = {name: count(model, architecture, units, LENGTH) for name, count in COSTS.items()}
    before = {"flops": flops(model, batch), "kv": cache_bytes(model, batch)}
    assert costs["kv"].total == before["kv"]
    assert costs["parameters"].total == sum(weight.size for weight in architecture.weights)
    head = 2 * model.get_output_embeddings().weight.numel()
    assert costs["flops"].total == before["flops"] - head
    for number, (unit, each) in enumerate(units.items(), start=1):
        gone = min(number, len(each) - 1)
        cut_out(model, each, torch.arange(gone))
        after = {"flops": flops(model, batch), "kv": cache_bytes(model, batch)}
        for name in after:
            assert before[name] - after[name] == gone * costs[name].each[unit], (name, unit)
        before = after


def test_an_expert_counts_as_often_as_a_token_meets_it():
    model, batch = FAMILIES["Mixtral"][0](), batch_of("Mixtral", length=LENGTH)
    architecture = find_architecture(model)
    experts = sum(weight.size for weight in architecture.weights if weight.expert is not None)
    rest = sum(weight.size for weight in architecture.weights if weight.expert is None)
    found = find_structures(model, architecture, batch).structures
    units = {unit: each for unit, each in found.items() if each.kind != "expert"}  # of which none is cut here
    attended = sum(4 * LENGTH * each.reads[0].index.numel() for each in units.values())
    met = model.config.num_experts_per_tok / model.config.num_local_experts
    assert COSTS["flops"](model, architecture, units, LENGTH).total == 2 * (rest + met * experts) + attended
