"""A packed model is the model that it was, and is read like one whose weights are elsewhere."""

import copy

import pytest
import torch

from optimum_dsa import DSAConfig, prune
from optimum_dsa.model.parameters import count_parameters
from optimum_dsa.packed.linear import PackedLinear
from optimum_dsa.packed.pack_model import LEAST_ZEROS, pack_model, packed_layers, seen_dense, unpack_model
from optimum_dsa.pruning.zeros import found_report

from ..conftest import FAMILIES
from ..tiny import same_state, state, tiny_llama, tokens


def pruned(model):
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform", skip_unprunable=True))
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_packed_and_back_bit_for_bit(family, tiny):
    model = pruned(tiny(family))
    before, names = state(model), list(model.state_dict())
    packing = pack_model(model)
    assert packing.packed == packed_layers(model) and packing.bytes_packed <= 0.65 * packing.bytes_before
    assert packing.packed or set(packing.dense.values()) == {"of class FalconLinear", "tied"}
    assert all(parameter.dim() < 2 or name in before for name, parameter in model.named_parameters())
    assert unpack_model(model) == packing.packed and not packed_layers(model)
    assert same_state(model, before) and list(model.state_dict()) == names


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_it_computes_the_same(family, tiny):
    model = pruned(tiny(family))
    inputs = {"input_ids": tokens(2)} | ({"decoder_input_ids": tokens(2)} if family == "t5" else {})
    expected = model(**inputs).logits
    assert pack_model(model).packed
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_is_tied_or_has_few_zeros_or_another_class_stays_dense_for_a_reason():
    class Own(torch.nn.Linear):
        pass

    model = pruned(tiny_llama(tie_word_embeddings=True))
    layer = model.model.layers[0]
    dense = layer.self_attn.q_proj.weight.data
    dense[dense == 0] = 0.01
    layer.self_attn.k_proj.__class__ = Own
    layer.mlp.gate_proj.weight = layer.mlp.up_proj.weight
    packing = pack_model(model)
    assert packing.dense == {
        "model.layers.0.self_attn.q_proj.weight": "fewer than 25% zeros",
        "model.layers.0.mlp.gate_proj.weight": "tied",
        "model.layers.0.mlp.up_proj.weight": "tied",
        "model.layers.0.self_attn.k_proj.weight": "of class Own",
        "lm_head.weight": "tied",
    }
    assert type(layer.self_attn.k_proj) is Own and len(packing.packed) == 7 * 3 - 4
    assert str(packing).startswith("17 matrices are packed: ") and "3 (tied; " in str(packing)
    total = sum(parameter.numel() for parameter in tiny_llama(tie_word_embeddings=True).parameters())
    # two of one layer share theirs
    assert packing.shares["lm_head.weight"] == model.lm_head.weight.numel() / (
        total - layer.mlp.up_proj.weight.numel()
    )
    assert pack_model(model).shares == packing.shares  # what is packed already counts
    for wrong in (25, "half", None, True):
        with pytest.raises(ValueError, match=f"least_zeros={wrong!r} is a share"):
            pack_model(model, wrong)


def test_embeddings_are_not_told_whatever_their_class(tiny):
    assert list(pack_model(pruned(tiny("opt"))).dense.values()) == ["tied"]


def test_the_share_that_is_asked_for_decides():
    model = tiny_llama()
    assert not pack_model(model, LEAST_ZEROS).packed
    assert len(pack_model(model, 0.0).packed) == 7 * 3 + 1


def test_experts_of_a_class_that_does_not_say_what_it_computes_stay_dense(tiny):
    packing = pack_model(pruned(tiny("dbrx")))
    experts = {name: why for name, why in packing.dense.items() if ".experts." in name}
    assert len(experts) == 6 and {why.partition(",")[0] for why in experts.values()} == {"in a DbrxExpertGLU"}
    assert sum(packing.shares[name] for name in experts) > 0.3 and "in a DbrxExpertGLU" in str(packing)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_reads_an_offloaded_model_reads_a_packed_one(family, tiny):
    model = pruned(tiny(family))
    expected, before = found_report(model), state(model)
    pack_model(model)
    names = packed_layers(model)
    with seen_dense(model):
        assert not packed_layers(model) and found_report(model) == expected
        assert count_parameters(model) == expected.parameters
    assert packed_layers(model) == names
    unpack_model(model)
    assert same_state(model, before)


def test_copies_states_and_generation():
    model = pruned(tiny_llama())
    expected = model.generate(tokens(1)[:, :5], max_new_tokens=5, do_sample=False)
    pack_model(model)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    for each in (model, again):
        assert torch.equal(each.generate(tokens(1)[:, :5], max_new_tokens=5, do_sample=False), expected)
    assert isinstance(again.model.layers[0].mlp.down_proj, PackedLinear)
    assert again.model.layers[0].mlp.down_proj.mask is not model.model.layers[0].mlp.down_proj.mask
