"""What decoding reads: every matrix as it is held, once, and no table of which a row is looked up."""

import torch
from torch import nn

from optimum_dsa.evaluation.reading import Memory, held, packed_bytes, weights_in, weights_read
from optimum_dsa.model.parameters import count_parameters
from optimum_dsa.packed.linear import PackedLinear

from ..tiny import tiny_llama


def size(model):
    return sum(value.nbytes for value in held(model).values())


def test_a_table_that_is_the_head_as_well_is_read():
    table = 97 * 32 * 4
    plain, tied = tiny_llama(), tiny_llama(tie_word_embeddings=True)
    assert weights_read(plain) == size(plain) - table
    assert weights_read(tied) == size(tied) == size(plain) - table


def test_of_experts_as_many_are_read_as_tokens_meet(tiny):
    model = tiny("mixtral")
    chosen, there = model.config.num_experts_per_tok, model.config.num_local_experts
    experts = sum(value.nbytes for name, value in model.named_parameters() if "experts" in name)
    table = model.get_input_embeddings().weight.nbytes
    assert weights_read(model) == size(model) - table - experts * (there - chosen) // there
    assert weights_read(model, batch_size=there) == size(model) - table


def packed_layer():
    """A matrix of 4 × 8 of which 5 weights are there, with a bias."""
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    keep = torch.zeros(32, dtype=torch.bool)
    keep[[0, 3, 9, 10, 31]] = True
    layer.weight.data = torch.ones(32).masked_fill(~keep, 0).view(4, 8).bfloat16()
    return PackedLinear.of(layer)


def test_packed_matrices_are_what_they_hold():
    model = tiny_llama()
    before, count = weights_read(model), count_parameters(model)
    assert packed_bytes(model) is None and weights_in(model) == count
    model.model.layers[0].mlp.up_proj = packed_layer()
    taken = 4 * 2 + 4 + 5 * 2 + 5 * 8  # bias, mask, values, starts
    assert packed_bytes(model) == taken
    assert weights_read(model) == before - 48 * 32 * 4 + taken
    assert weights_in(model) == count - 48 * 32 + 4 * 8 + 4


def test_the_memory_is_as_fast_as_at_its_best(monkeypatch):
    monkeypatch.setattr("optimum_dsa.evaluation.reading.PROBE", 2**20)
    monkeypatch.setattr("optimum_dsa.evaluation.reading._CACHE", 2**10)
    # a sum in 2 s and a copy in 1 s; the second time in 4 s and 5 s
    clock = iter([0, 2, 2, 3, 3, 7, 7, 12])
    monkeypatch.setattr("optimum_dsa.evaluation.reading.time.perf_counter", lambda: next(clock))
    memory = Memory("cpu")
    assert memory.bandwidth is None
    for _ in range(2):
        memory.measure()
        assert memory.bandwidth == 2 * 2**20


def test_no_room_is_no_measurement(monkeypatch):
    monkeypatch.setattr("optimum_dsa.evaluation.reading.PROBE", 2**61)
    memory = Memory("cpu")
    memory.measure()
    assert memory.bandwidth is None
