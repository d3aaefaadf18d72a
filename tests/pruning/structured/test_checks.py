"""What keeps a model from being cut is one line, before any work."""

import peft
import pytest
import torch
from torch import nn

from optimum_dsa import DSAConfig, DSAPruner, DSAStructuredConfig, prune, prune_structures

from ...tiny import same_state, state, tiny_llama, tokens


def with_adapters():
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: nn.Linear(3, 3), "and Linear is none: it has no config"),
        (with_adapters, "has adapters, whose sizes are those of the model as it is; merge them"),
    ],
)
def test_what_is_no_model_in_memory_without_adapters_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        prune_structures(make(), tokens(), DSAStructuredConfig(0.2))
    assert "\n" not in str(raised.value)


def test_a_pruner_is_of_transformers_models():
    with pytest.raises(ValueError, match="Linear is none: it has no config"):
        DSAPruner(nn.Linear(3, 3))


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_what_is_excluded_counts_and_stays(layout):
    """A share is of all blocks' matrices, whatever of them is excluded."""
    model = tiny_llama()
    whole = state(model)
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.1, exclude=("q_proj",), layout=layout))
    assert report.prunable == prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.1)).prunable
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, whole["model.layers.1.self_attn.q_proj.weight"])


def test_blocks_cannot_stay_alike_where_some_are_excluded():
    model = tiny_llama()
    whole, excluded = state(model), {"exclude": ("layers.0", "layers.2.mlp")}
    with pytest.raises(
        ValueError, match=r"keeps the ffn of model.layers.0 whole \(and of 1 more blocks\), and layout="
    ):
        prune_structures(model, tokens(), DSAStructuredConfig(0.1, **excluded))
    assert same_state(model, whole)
    report = prune_structures(model, tokens(), DSAStructuredConfig(0.05, layout="per_layer", **excluded))
    assert {unit for unit, gone in report.gone.items() if gone} == {"model.layers.1:ffn"}


@pytest.mark.parametrize("update", ["none", "refit"])
def test_zeros_are_not_filled(update):
    model = tiny_llama()
    prune(model, tokens(), DSAConfig(0.5, allocation="uniform"))
    whole = state(model)
    if update == "refit":
        with pytest.raises(ValueError, match=r"50.00% of the matrices that update='refit' fits are zero"):
            prune_structures(model, tokens(), DSAStructuredConfig(0.2, update=update))
        assert same_state(model, whole)
        return
    prune_structures(model, tokens(), DSAStructuredConfig(0.2, update=update))
    zeros = (model.model.layers[0].mlp.down_proj.weight == 0).float().mean()
    assert 0.3 < zeros < 0.7


def test_columns_of_zeros_are_what_was_silenced():
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    assert prune_structures(model, tokens(), DSAStructuredConfig(0.2)).removed
