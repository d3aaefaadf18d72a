"""A model computes with other matrices for a while, and is then what it was."""

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.pruning.structured.instead import computing_with, evaluating, matrices_without
from optimum_dsa.pruning.structured.slicing import silence
from optimum_dsa.pruning.structured.structures import find_structures
from optimum_dsa.pruning.structured.widths.felt import Felt

from ...tiny import same_state, state
from .families import FAMILIES, batch_of


@pytest.mark.parametrize("family", ["Llama", "GPT2", "T5"])
def test_without_structures_is_with_them_silenced(family):
    model, silenced = (FAMILIES[family][0]() for _ in range(2))
    before, batch = state(model), batch_of(family)
    for each in find_structures(model, find_architecture(model), batch).structures.values():
        gone = torch.tensor([0, len(each) - 1])
        values = matrices_without(model, each, gone, None, 0.01)
        silence(silenced, each, gone)
        for name, value in values.items():
            assert torch.equal(value, silenced.get_parameter(name))
        assert same_state(model, before)
        with computing_with(model, values):
            assert not same_state(model, before)
    assert same_state(model, before)


@pytest.mark.parametrize("family", ["Llama", "Bert", "T5", "ViT"])
def test_what_is_felt_grows_with_what_goes(family):
    model, batch = FAMILIES[family][0](), batch_of(family, samples=2)
    architecture = find_architecture(model)
    each = list(find_structures(model, architecture, batch_of(family)).structures.values())[-1]
    felt = Felt(model, architecture, batch)
    changes = []
    for number in (0, 1, len(each)):
        with computing_with(model, matrices_without(model, each, torch.arange(number), None, 0.01)):
            changes.append(felt.change())
    assert 0 == changes[0] < changes[1] < changes[2]


def test_modules_are_as_they_were_even_after_an_error():
    model = FAMILIES["Llama"][0]().train()
    model.model.layers[0].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
