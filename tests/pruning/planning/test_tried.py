"""What trying every named allocation takes: as many prunes, what is held meanwhile, and a way to do without."""

from dataclasses import replace

import pytest
import torch

from optimum_dsa import DSAConfig
from optimum_dsa.pruning.allocation import measured_in_one_walk
from optimum_dsa.pruning.planning.memory import phases
from optimum_dsa.pruning.planning.plan import plan_for, text_of
from optimum_dsa.pruning.planning.tried import each_try, last, time_of, tries_of

from .test_plan import GB, llama


AUTO = DSAConfig(0.5, "sparsegpt", "auto")
SHAPE = replace(llama(), vocabulary=128256)


def test_only_auto_tries_anything():
    assert tries_of(DSAConfig(0.5), 128, 2048) is None
    tries = tries_of(AUTO, 128, 2048)
    assert (tries.number, tries.windows, tries.length, tries.tokens) == (
        len(measured_in_one_walk()),
        32,
        2048,
        32 * 2048,
    )


def test_a_try_trains_no_blocks_and_the_result_is_pruned_as_asked():
    config = replace(AUTO, reconstruct={"steps": 8}, pattern="mixed:8", permute="ria")
    tried, result = each_try(config), last(config)
    assert (tried.allocation, tried.reconstruct.steps, tried.permute) == ("uniform", 0, None)
    assert result == replace(config, allocation="dsa") and last(result) is result
    assert tried.resolved.updates and tried.pattern == "mixed:8"


def test_the_time_is_that_of_all_prunes_and_more_than_ten_times_one():
    tries, known = tries_of(AUTO, 128, 2048), {}

    def prune(config):
        known.setdefault(config.allocation, 0)
        return 100.0 if config.allocation == "dsa" else 80.0

    assert time_of(DSAConfig(0.5), None, prune, 9.0) == 100
    found = time_of(AUTO, tries, prune, 1.0)
    assert found == 100 + (tries.number + 1) * 80 + (2 * tries.number + 1) > 10 * 100
    assert known.keys() == {"dsa", "uniform"}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_is_held_while_allocations_are_tried_is_in_the_memory(method):
    config = DSAConfig(0.5, method, "auto")
    found = phases(SHAPE, config, text_of(SHAPE, config))
    prunable = sum(block.size for block in SHAPE.blocks)
    copied = 1 + (SHAPE.itemsize if method == "sparsegpt" else 0)
    for name in ("trying allocations", "judging allocations"):
        assert found[name]["tried weights"] == copied * prunable
        assert found[name]["weights"] == SHAPE.parameters * SHAPE.itemsize
        assert found[name]["dense predictions"] == 32 * 2048 * 512 * 6
    assert found["comparing masks"]["orders"] == 2 * prunable
    # the logits of a batch, as long as the vocabulary
    assert found["judging allocations"]["one batch"] > 8 * 2048 * SHAPE.vocabulary * 8
    settled = phases(SHAPE, replace(config, allocation="dsa"), text_of(SHAPE, config))
    assert found == settled | {name: found[name] for name in found.keys() - settled.keys()}


def test_a_plan_says_that_they_are_tried_and_the_way_out_is_to_name_one():
    plan = plan_for(SHAPE, AUTO, available=200 * GB, seconds=3600.0)
    said = f"{len(measured_in_one_walk())} allocations are tried first, each judged on 32 x 2048 tokens"
    assert said in plan.line and said in str(plan) and plan.to_dict()["tries"]["number"] == len(measured_in_one_walk())
    named = plan_for(SHAPE, replace(AUTO, allocation="dsa"), available=200 * GB)
    assert "tried" not in str(named) and named.to_dict()["tries"] is None and named.total < plan.total
    short = plan_for(SHAPE, replace(AUTO, batch_size=1), available=(named.total + plan.total) // 4)
    assert "--allocation dsa" in short.remedy.options


def test_blocks_that_are_trained_together_cannot_be_on_the_disk():
    config = DSAConfig(0.5, reconstruct={"steps": 8, "span": 4})
    remedies = {}
    for available in (14, 10, 6):
        options = plan_for(SHAPE, config, available=available * GB).remedy.options
        remedies[available] = options
        # On the disk is one block at a time: together only with --span 1 before it.
        assert "--device-map disk" not in options or "--span 1" in options[: options.index("--device-map disk")]
    assert any("--span 1" in options and "--device-map disk" in options for options in remedies.values()), remedies


def test_the_vocabulary_is_part_of_a_shape():
    from optimum_dsa import find_architecture
    from optimum_dsa.pruning.planning.shape import shape_of

    from ...tiny import tiny_llama

    with torch.device("meta"):
        model = tiny_llama()
    assert shape_of(model, find_architecture(model), torch.float32).vocabulary == model.config.vocab_size
