"""What an allocator that runs the model is given, and that it leaves the model as it was."""

import pytest
import torch

from optimum_dsa import Calibration, DSAConfig, allocate, find_architecture
from optimum_dsa.model.statistics import CollectedStatistics
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.allocate import architecture_for, seen_by_allocator
from optimum_dsa.pruning.allocation import ALLOCATIONS, measured_in_one_walk
from optimum_dsa.pruning.allocation.whole import masked_for_the_next, restored

from ...tiny import same_state, state, tiny_llama, tokens


RUN = [name for name in ALLOCATIONS if ALLOCATIONS[name].reads == "model"]


def seen_of(model, ids=None, name="besa", **settings):
    config = DSAConfig(**{"sparsity": 0.6, "allocation": name, **settings})
    calibration = Calibration({"input_ids": tokens() if ids is None else ids}, "tokens")
    return seen_by_allocator(model, architecture_for(model, config), calibration, config)


def test_a_block_that_is_changed_for_the_next_is_what_it_was_afterwards():
    model, walked = tiny_llama(), []
    before = state(model)

    def change(block):
        assert all(torch.equal(block.state()[weight.name], before[weight.name]) for weight in block.weights)
        walked.append(block.statistics[block.weights[0].name].input_norm.clone())
        block.tensor(block.weights[0]).zero_()

    batches = [{"input_ids": tokens()}]
    masked_for_the_next(walk_blocks(model, find_architecture(model), batches), change)
    assert same_state(model, before) and len(walked) == 3
    plain = [
        block.statistics[block.weights[0].name].input_norm
        for block in walk_blocks(model, find_architecture(model), batches)
    ]
    assert torch.equal(plain[0], walked[0])
    assert not any(torch.equal(one, other) for one, other in zip(plain[1:], walked[1:]))


def test_it_is_restored_after_an_error_as_well():
    model = tiny_llama()
    before = state(model)
    walked = next(walk_blocks(model, find_architecture(model), None))
    with pytest.raises(RuntimeError, match="so"), restored(walked):
        walked.tensor(walked.weights[0]).zero_()
        raise RuntimeError("so")
    assert same_state(model, before)


@pytest.mark.parametrize("name", RUN)
def test_statistics_alone_do_not_do(name):
    model = tiny_llama()
    collected = {}
    for walked in walk_blocks(model, find_architecture(model), [{"input_ids": tokens()}]):
        collected |= walked.statistics
    with pytest.raises(ValueError, match="runs the model on text, and these statistics are there already"):
        allocate(model, CollectedStatistics(collected, "training"), DSAConfig(0.6, "wanda", name))
    with pytest.raises(ValueError, match="needs calibration data"):
        allocate(model, None, DSAConfig(0.6, "magnitude", name, allocation_metric="magnitude"))


def test_structures_are_not_theirs():
    from optimum_dsa.pruning.structured.widths.shares import allocator_of

    with pytest.raises(ValueError, match="knows nothing of structures; name one of .*owl"):
        allocator_of("besa")
    assert allocator_of("owl") is ALLOCATIONS["owl"]


def test_batches_are_of_so_many_windows_at_most():
    seen = seen_of(tiny_llama(), tokens(7), batch_size=4)
    assert [len(each["input_ids"]) for each in seen.batches(8, None)] == [4, 3]
    assert [len(each["input_ids"]) for each in seen.batches(2, 5)] == [2, 2]
    assert [len(each["input_ids"]) for each in seen.batches(1, 3)] == [1, 1, 1]


def test_a_mask_removes_its_share_by_the_metric_and_the_pattern():
    model = tiny_llama()
    seen = seen_of(model, allocation_metric="magnitude", pattern="matrix")
    weight = seen.architecture.weights[0].tensor(model)
    keep = seen.keep(weight, None, 0.25)
    assert int((~keep).sum()) == weight.numel() // 4
    assert weight[keep].abs().min() >= weight[~keep].abs().max()


def test_those_that_run_the_model_are_not_tried_by_themselves():
    assert set(measured_in_one_walk()) == set(ALLOCATIONS) - set(RUN) and len(RUN) == 4
