"""What can be cut out of a model is found by wiring; cut out, the model gives what it gives with it silenced."""

import copy

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from optimum_dsa import find_architecture
from optimum_dsa.model.parameters import count_parameters
from optimum_dsa.pruning.structured.slicing import cut_out, silence
from optimum_dsa.pruning.structured.structures import find_structures

from ...tiny import same_state, state, tiny_llama, tokens
from .families import EVERY, FAMILIES, batch_of


def found_in(model, family="Llama"):
    return find_structures(model, find_architecture(model), batch_of(family))


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", EVERY)
def test_the_model_cut_gives_what_the_model_silenced_gives(family):
    make, kinds = EVERY[family]
    dense = make()
    before = state(dense)
    found = found_in(dense, family)
    assert same_state(dense, before)
    counts = {}
    for each in found.structures.values():
        counts.setdefault(each.kind, set()).add(len(each))
    assert {kind: {number} for kind, number in kinds.items()} == counts

    silenced, cut, batch = copy.deepcopy(dense), copy.deepcopy(dense), batch_of(family, samples=2)
    fewer, tied = 0, {}
    for number, each in enumerate(found.structures.values()):
        # Every unit its own number, so that blocks come to differ, but what goes alike.
        number = tied.setdefault(each.tied or each.unit, number)
        gone = torch.randperm(len(each), generator=torch.Generator().manual_seed(number))[
            : max(len(each) // 2 - number % 2, 1)
        ]
        fewer += each.cost(dense) * len(gone)
        silence(silenced, each, gone)
        cut_out(cut, each, gone)
    torch.testing.assert_close(logits(cut, batch), logits(silenced, batch), rtol=1e-4, atol=1e-5)
    assert (logits(silenced, batch) - logits(dense, batch)).abs().max() > 1e-3
    assert count_parameters(cut) == count_parameters(dense) - fewer


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Falcon"])
def test_a_cut_model_generates_with_its_cache(family):
    model = FAMILIES[family][0]()
    for each in found_in(model, family).structures.values():
        cut_out(model, each, torch.arange(len(each) // 2))
    prompt = batch_of(family)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(prompt, use_cache=True, **options), model.generate(prompt, use_cache=False, **options)
    )


@pytest.mark.parametrize("family", ["Bloom", "Mpt", "Falcon with slopes"])
def test_heads_that_stay_keep_their_slopes(family):
    """In a batch of any size, with padding, from a cache, and once more of what is left."""
    silenced, cut = (EVERY[family][0]() for _ in range(2))
    heads = {unit: each for unit, each in found_in(cut, family).structures.items() if each.kind != "ffn"}
    for number, each in enumerate(heads.values()):
        assert each.slopes == 4
        silence(silenced, each, torch.tensor([number]))
        cut_out(cut, each, torch.tensor([number]))
    for samples, length in ((1, 12), (3, 12), (4, 4)):
        batch = batch_of(family, samples, length)
        mask = torch.ones_like(batch["input_ids"]).index_fill(1, torch.arange(2), 0)
        for given in (batch, {**batch, "attention_mask": mask}):
            expected = logits(silenced, given)[:, 2:]
            torch.testing.assert_close(logits(cut, given)[:, 2:], expected, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(cut.generate(**batch, **options), silenced.generate(**batch, **options))

    again = {unit: each for unit, each in found_in(cut, family).structures.items() if each.kind != "ffn"}
    assert again.keys() == heads.keys() or family == "Falcon with slopes"  # of which one group is left
    for each in again.values():
        silence(silenced := copy.deepcopy(cut), each, torch.tensor([0]))
        cut_out(cut, each, torch.tensor([0]))
        torch.testing.assert_close(logits(cut, batch), logits(silenced, batch), rtol=1e-4, atol=1e-5)


def test_experts_of_groups_are_left_by_name():
    """DeepSeek chooses groups of experts first, which have to be of one size."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "v_head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "first_k_dense_replace": 1, "moe_intermediate_size": 24}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **ranks, **routed)).eval()
    found = found_in(model)
    assert not any(each.kind == "expert" for each in found.structures.values())
    for name in ("experts.down_proj[0]", "gate.weight"):
        assert found.left[f"model.layers.1.mlp.{name}"].startswith("experts: cannot be cut: ")


def test_a_matrix_that_is_left_dense_keeps_what_it_shares_structures_with():
    model = tiny_llama()
    found = find_structures(model, find_architecture(model, exclude=["*layers.1.mlp.up_proj"]), batch_of("Llama"))
    assert "model.layers.0:ffn" in found.structures and "model.layers.1:ffn" not in found.structures
    assert "model.layers.1:kv_group" in found.structures


def test_blocks_of_one_shape_that_are_wired_otherwise_are_looked_at_anew():
    """In the second block gate and up are permuted: what was found in the first does not hold there."""
    model = tiny_llama()
    mlp, order = model.model.layers[1].mlp, torch.arange(48).flip(0)
    plain = mlp.forward

    def permuted(x):
        return mlp.down_proj((mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))[..., order])

    mlp.forward = permuted
    found = found_in(model)
    batch = batch_of("Llama")
    each = found.structures["model.layers.1:ffn"]
    rows, columns = each.makes[0].index[:, 0], each.reads[0].index[:, 0]
    assert torch.equal(rows, order[columns]) and plain is not mlp.forward
    assert torch.equal(found.structures["model.layers.0:ffn"].makes[0].index, torch.arange(48)[:, None])
    assert logits(model, batch).isfinite().all()


def test_all_of_a_kind_cannot_go():
    model = tiny_llama()
    each = found_in(model).structures["model.layers.0:ffn"]
    with pytest.raises(ValueError, match="model.layers.0:ffn has 48 structures and 48 are to go; leave one"):
        cut_out(model, each, torch.arange(48))
    before = state(model)
    cut_out(model, each, torch.arange(0))
    assert same_state(model, before)


def test_cut_matrices_say_how_large_they_are_and_train():
    model = tiny_llama()
    for each in found_in(model).structures.values():
        cut_out(model, each, torch.arange(len(each) // 2))
    layer = model.model.layers[0]
    assert (layer.mlp.gate_proj.out_features, layer.mlp.down_proj.in_features) == (24, 24)
    assert layer.self_attn.q_proj.weight.shape == (16, 32) == (layer.self_attn.q_proj.out_features, 32)
    model(tokens(), labels=tokens()).loss.backward()
    assert layer.mlp.down_proj.weight.grad.shape == (32, 24)
