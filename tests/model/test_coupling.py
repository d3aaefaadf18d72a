"""Channels that can change places: found by wiring in every family, and the model computes the same in any order."""

import pytest
import torch
from torch import nn

from optimum_dsa.model.architecture import find_architecture
from optimum_dsa.model.calls import feed
from optimum_dsa.model.coupling import find_couplings, reorder_
from optimum_dsa.model.walk import walk_blocks

from ..conftest import FAMILIES
from ..tiny import same_state, state, tiny_llama, tokens


GATED = ({"gate_proj", "up_proj"}, {"down_proj"}, (1, 48))
# family -> (producers, consumers, (copies, size) of a set) in its first block
EXPECTED = {
    "llama": [({"v_proj"}, {"o_proj"}, (2, 8)), GATED],
    "qwen2": [({"v_proj"}, {"o_proj"}, (2, 8)), GATED],
    "phi": [({"v_proj"}, {"dense"}, (2, 8)), ({"fc1"}, {"fc2"}, (1, 48))],
    "opt": [({"v_proj"}, {"out_proj"}, (1, 8)), ({"fc1"}, {"fc2"}, (1, 48))],
    "gpt2": [({"c_fc"}, {"c_proj"}, (1, 128))],  # q, k and v in one matrix: o stays
    "gemma4": [GATED],  # keys and values are shared with later blocks, and values are normed
    "mixtral": [({"v_proj"}, {"o_proj"}, (2, 8))],  # experts of one parameter stay
    "deepseek_v3": [GATED],
    "jetmoe": [],
    "bert": [({"value"}, {"dense"}, (1, 8)), ({"dense"}, {"dense"}, (1, 48))],
}


def last(weights):
    return {weight.module.split(".")[-1] for weight in weights}


def reordered(walked, coupling, generator):
    orders = [torch.randperm(places.columns.shape[1], generator=generator) for places in coupling.sets]
    reorder_(walked, coupling, orders)
    return orders


def llama_with(between, place):
    """A Llama with something of its own between the matrices of its MLP."""
    model = tiny_llama(num_hidden_layers=1)
    setattr(model.model.layers[0].mlp, place, between)
    return model


class Scaled(nn.Module):
    """An activation that differs from channel to channel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 48))

    def forward(self, hidden):
        return nn.functional.silu(hidden * self.scale)


class Normed(nn.Module):
    def forward(self, hidden):
        return hidden / hidden.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_computes_the_same_in_any_order_and_the_inverse_brings_it_back(family, tiny, inputs):
    model, batch, generator = tiny(family), inputs(family), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # zeros and ones by themselves, which have no order
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    dense, before = feed(model, batch).logits, state(model)
    architecture, moved = find_architecture(model), []
    for walked in walk_blocks(model, architecture, [batch]):
        couplings, left = find_couplings(walked)
        consumers = {weight.name for coupling in couplings for weight in coupling.consumers}
        assert consumers | set(left) == {weight.name for weight in walked.weights} and not consumers & set(left)
        if family in EXPECTED and walked.block is architecture.blocks[0]:
            found = [(last(c.producers), last(c.consumers), tuple(c.sets[0].columns.shape)) for c in couplings]
            assert found == EXPECTED[family]
        moved += [(coupling, reordered(walked, coupling, generator)) for coupling in couplings]
    torch.testing.assert_close(feed(model, batch).logits, dense, rtol=1e-4, atol=1e-4)
    assert same_state(model, before) == (not moved)
    for walked in walk_blocks(model, architecture, None):
        for coupling, orders in moved:
            if coupling.consumers[0] in walked.weights:
                reorder_(walked, coupling, [order.argsort() for order in orders])
    assert same_state(model, before)


def test_what_one_channel_alone_goes_through_or_all_do_together_holds_them_in_place():
    for model in (llama_with(Scaled(), "act_fn"), llama_with(Normed(), "act_fn")):
        (walked,) = walk_blocks(model, find_architecture(model), [{"input_ids": tokens()}])
        couplings, left = find_couplings(walked)
        assert [last(coupling.consumers) for coupling in couplings] == [{"o_proj"}]
        assert "model.layers.0.mlp.down_proj.weight" in left
    # a matrix that is left dense is not moved, and holds those beside it in place
    model = tiny_llama(num_hidden_layers=1)
    found = find_architecture(model, exclude=["up_proj"])
    (walked,) = walk_blocks(model, found, [{"input_ids": tokens()}])
    assert [last(coupling.consumers) for coupling in find_couplings(walked)[0]] == [{"o_proj"}]


@pytest.mark.parametrize("reads", [{"inputs"}, {"inputs", "gram", "cross_gram", "residual"}])
@torch.no_grad()
def test_statistics_are_put_in_order_as_if_they_had_been_collected_so(reads):
    model, generator = tiny_llama(), torch.Generator().manual_seed(0)
    batches = [{"input_ids": part} for part in tokens().split(4)]
    for walked in walk_blocks(model, find_architecture(model), batches, reads=reads):
        for coupling in find_couplings(walked)[0]:
            reordered(walked, coupling, generator)
            walked.rewritten()
            again = walked.again(coupling.consumers)
            for weight in coupling.consumers:
                moved, fresh = walked.statistics[weight.name], again[weight.name]
                for name in ("squared_sum", *({"gram", "drift", "lack"} if len(reads) > 1 else ())):
                    torch.testing.assert_close(getattr(moved, name), getattr(fresh, name), rtol=1e-4, atol=1e-4)
        for weight in walked.weights:  # so that the two streams part
            walked.tensor(weight)[:, ::2] = 0
            walked.changed(weight)
