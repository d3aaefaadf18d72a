"""Blocks that an earlier walk has finished: made what they were left as, and passed by."""

import copy

import torch

from optimum_dsa import find_architecture, walk_blocks

from ..tiny import state, tiny_llama, tokens


def test_a_walk_passes_finished_blocks_by_and_shows_the_next_what_it_saw():
    model, batches = tiny_llama(), [{"input_ids": tokens()}]
    reads = {"inputs", "gram", "cross_gram"}

    def walk(finished):
        for walked in walk_blocks(model, find_architecture(model), batches, reads=reads, finished=finished):
            for weight in walked.weights:
                walked.tensor(weight)[:, ::2] = 0
            yield walked

    before = state(model)
    whole = {walked.name: walked.statistics for walked in walk(0)}
    model.load_state_dict(before)
    part = {walked.name: walked.statistics for walked in walk(2)}
    assert part["model.layers.0"] == part["model.layers.1"] == {}
    for name, found in part["model.layers.2"].items():
        assert torch.equal(found.gram, whole["model.layers.2"][name].gram)
        assert torch.equal(found.drift, whole["model.layers.2"][name].drift)


def test_where_everything_is_finished_nothing_is_run():
    model = tiny_llama()
    runs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    found = find_architecture(model, include=["lm_head"])
    seen = []
    for walked in walk_blocks(model, found, [{"input_ids": tokens()}] * 2, finished=4):
        if not seen:
            runs.clear()  # what was run to learn how blocks are called
        seen.append(walked.name)
        assert walked.statistics == {}
    assert len(seen) == 4 and not runs


def test_a_block_has_all_that_a_checkpoint_has_of_it_and_becomes_what_it_is_told():
    model = tiny_llama(tie_word_embeddings=True)
    before, names = state(model), set()
    found = find_architecture(model, include=["lm_head", "embed_tokens"])
    for walked in walk_blocks(model, found, None):
        values = walked.state()
        names |= values.keys()
        walked.become({name: value.clone() for name, value in values.items()})
        assert not walked.changes  # what is so already is not written again
        last = list(values)[-1]
        walked.become({last: torch.full_like(values[last], -0.0)})
        walked.become({last: torch.zeros_like(values[last])})
        assert walked.changes == {last} and not model.state_dict()[last].signbit().any()
    assert names | {"model.norm.weight", "model.embed_tokens.weight"} == before.keys()


def test_without_batches_nothing_is_run(tiny):
    model = copy.deepcopy(tiny("llama"))
    model.forward = None
    found = find_architecture(model)
    assert [(block.name, block.statistics) for block in walk_blocks(model, found, None)] == [
        (block.name, {}) for block in found.blocks
    ]
