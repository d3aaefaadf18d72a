"""Gates in front of what reads structures: at 0 a structure is silenced, at 1 nothing is changed."""

import copy

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.pruning.structured.learners.gates import Gates
from optimum_dsa.pruning.structured.slicing import silence
from optimum_dsa.pruning.structured.structures import find_structures

from ....tiny import same_state, state, tiny_llama, tokens
from ..families import FAMILIES, batch_of


def gates_of(model, family="Llama"):
    found = find_structures(model, find_architecture(model), batch_of(family)).structures
    # Of experts none is read by a matrix.
    return Gates(model, {unit: each for unit, each in found.items() if each.reads})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_gate_of_zero_silences_and_a_gate_of_one_does_nothing(family):
    model, batch = FAMILIES[family][0](), batch_of(family, samples=2)
    gates, dense, before = gates_of(model, family), FAMILIES[family][0](), state(model)
    values = {}
    for number, (unit, each) in enumerate(gates.structures.items()):
        gone = torch.arange(number % 2, len(each), 2)
        silence(dense, each, gone)
        values[unit] = torch.ones(len(each)).index_fill(0, gone, 0)
    whole = model(**batch).logits
    with gates.at(values):
        torch.testing.assert_close(model(**batch).logits, dense(**batch).logits)
    with gates.at({unit: torch.ones_like(each) for unit, each in values.items()}):
        assert torch.equal(model(**batch).logits, whole)
    # no hook stays behind, and no weight was touched
    assert torch.equal(model(**batch).logits, whole) and same_state(model, before)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "OPT", "Bert"])
@torch.no_grad()
def test_folded_gates_give_what_gates_give(family):
    model, batch = FAMILIES[family][0](), batch_of(family, samples=2)
    gates, draw = gates_of(model, family), torch.Generator().manual_seed(1)
    values = {unit: torch.rand(size, generator=draw) + 0.5 for unit, size in gates.sizes().items()}
    with gates.at(values):
        expected = model(**batch).logits
    gates.fold(values)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_slope_of_a_gate_is_how_fast_the_loss_rises():
    model = tiny_llama().double()
    gates = gates_of(tiny_llama())
    gates.model = model
    values = {unit: torch.ones(size, dtype=torch.float64) for unit, size in gates.sizes().items()}

    def loss(values):
        with gates.at(values):
            return model(tokens()).logits.square().mean()

    one = copy.deepcopy(values)
    for unit, number in (("model.layers.1:ffn", 5), ("model.layers.0:kv_group", 1)):
        values[unit].requires_grad_()
        (slope,) = torch.autograd.grad(loss(values), values[unit])
        higher, lower = (
            {**one, unit: one[unit].clone().index_add(0, torch.tensor([number]), torch.tensor([by]).double())}
            for by in (0.1, -0.1)
        )
        with torch.no_grad():
            assert slope[number].item() == pytest.approx((loss(higher) - loss(lower)).item() / 0.2, rel=0.05)
