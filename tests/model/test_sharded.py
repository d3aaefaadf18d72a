"""Shares of a model (FSDP 2, here of one process that has all of them), the whole, and back."""

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from optimum_dsa.model.sharded import copy_into, is_sharded, local, reshard, shared_like, twin, whole
from optimum_dsa.pruning.zeros import zeros_in

from ..tiny import same_state, state, tiny_llama, tokens


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def sharded(group):
    model = tiny_llama(tie_word_embeddings=True)
    made = twin(model)
    for layer in made.model.layers:
        fully_shard(layer)
    return model, fully_shard(made)


@pytest.mark.contract
def test_a_twin_has_the_parameters_and_no_module(group):
    model, calls = tiny_llama(tie_word_embeddings=True), []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    made = twin(model)
    assert not {id(module) for module in made.modules()} & {id(module) for module in model.modules()}
    assert [id(value) for value in made.parameters()] == [id(value) for value in model.parameters()]
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert torch.equal(made(tokens()).logits, model(tokens()).logits) and len(calls) == 2
    made.model.norm.register_forward_hook(lambda *_: calls.append(2))
    model(tokens())
    assert calls == [1, 1, 1]


def test_what_was_put_upon_a_module_stays_behind():
    model = tiny_llama()
    model.forward = lambda *_, **__: None
    assert model(tokens()) is None and twin(model)(tokens()).logits.shape == (6, 16, 97)


@pytest.mark.contract
def test_sharding_a_twin_leaves_the_model_as_it_is(sharded):
    model, made = sharded
    assert is_sharded(made) and not is_sharded(model)
    assert type(model).__name__ == "LlamaForCausalLM" and type(made).__name__ == "FSDPLlamaForCausalLM"
    assert torch.equal(made(tokens()).logits, model(tokens()).logits)


def test_shares_are_gathered_and_given_back(sharded):
    model, made = sharded
    made(tokens())  # leaves whole values in the place of some shares
    gathered = twin(made, gathered=True)
    assert type(gathered) is type(model) and not is_sharded(gathered) and gathered.lm_head.weight.requires_grad
    assert gathered.lm_head.weight is gathered.model.embed_tokens.weight
    assert torch.equal(gathered(tokens()).logits, model(tokens()).logits)
    before = state(model)
    with torch.no_grad():
        for value in gathered.parameters():
            value.zero_()
    assert same_state(model, before)
    copy_into(made, gathered)
    assert not made(tokens()).logits.any()
    copy_into(model, made)
    assert all(not value.any() for value in model.parameters())


def test_a_share_writes_through_and_the_whole_does_not(sharded):
    model, made = sharded
    reshard(made)
    weight = made.model.layers[0].mlp.up_proj.weight
    plain = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(whole(weight), plain) and whole(plain) is plain and local(plain) is plain
    local(weight.data)[:2] = 0
    assert zeros_in(weight.data) == 2 * 32 and zeros_in(plain) == 0
    full = torch.rand(48, 32)
    shared = shared_like(full, weight)
    assert torch.equal(whole(shared), full) and shared.placements == weight.placements
    assert shared_like(full, plain) is full


def test_a_gathered_copy_of_an_ordinary_model_shares_its_parameters():
    model = tiny_llama()
    made = twin(model, gathered=True)
    assert made.lm_head.weight is model.lm_head.weight
    assert torch.equal(copy.deepcopy(made)(tokens()).logits, model(tokens()).logits)
