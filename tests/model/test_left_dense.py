import logging

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from optimum_dsa import DSAConfig
from optimum_dsa.model.left_dense import excluding, kind_of, share_of, sizes_of, told
from optimum_dsa.pruning.allocate import _warn_once, architecture_for, say_dense
from optimum_dsa.pruning.prune import prune

from ..tiny import tiny_llama, tokens


@pytest.fixture(autouse=True)
def said_by_nobody():
    """What another test in this process has said is not said again."""
    _warn_once.cache_clear()


def test_blocks_and_experts_of_a_kind_have_one_name_and_other_numbers_stay():
    assert kind_of("model.layers.3.mlp.experts.down_proj[17]") == "model.layers.*.mlp.experts.down_proj[*]"
    assert kind_of("h.0.conv1d.weight") == "h.*.conv1d.weight" and kind_of("w1") == "w1"
    assert excluding(["a.0.w[1]", "a.1.w[0]", "a.1.b"]) == ["a.*.b", "a.*.w"]


def test_shares_are_of_what_is_left_and_what_is_pruned_together_largest_first():
    sizes = {"h.0.a": 10, "h.1.a": 10, "h.0.b": 30}
    assert share_of(sizes, 50) == 0.5 and share_of({}, 0) == 0
    assert told(sizes, 50) == "50.0% of the blocks' weights: h.0.b 30.0%, h.*.a 20.0%"
    many = {f"part{letter}": 10 for letter in "abcdef"}
    assert told(many, 40).endswith("partd 10.0%, 2 more 20.0%")


def test_a_shared_matrix_is_counted_once_and_an_expert_for_itself():
    model = nn.Module()
    model.one = nn.Linear(4, 3, bias=False)
    model.other = nn.Linear(4, 3, bias=False)
    model.other.weight = model.one.weight
    model.experts = nn.Parameter(torch.zeros(5, 2, 3))
    names = ["one.weight", "other.weight", "experts[3]", "experts[4]"]
    assert sizes_of(model, names) == dict(zip(names, [12, 0, 6, 6]))


def test_a_head_that_is_pruned_as_well_is_none_of_the_blocks(caplog):
    model = tiny_llama()
    with caplog.at_level(logging.WARNING):
        config = DSAConfig(0.5, "magnitude", "uniform", exclude=("layers.0",), include=("lm_head",))
        say_dense(model, architecture_for(model, config), False)
    assert "Stays dense (excluded): 33.3% of the blocks' weights: model.layers.0." in caplog.text
    assert "layers.*" not in caplog.text
    assert "33.3% of the blocks' weights" in str(prune(model, None, config))


@pytest.mark.parametrize("exclude,said", [("mlp", True), ("layers.0.self_attn.k_proj", False)])
def test_a_large_part_that_is_excluded_is_said_before_the_work_and_in_the_report(exclude, said, caplog):
    model, config = tiny_llama(), DSAConfig(0.5, allocation="uniform", exclude=[exclude])
    with caplog.at_level(logging.WARNING):
        report = prune(model, tokens(), config)
    share = sum(report.dense_sizes.values()) / (
        sum(report.dense_sizes.values()) + sum(report.allocation.sizes.values())
    )
    assert (share >= 0.05) == said
    line = f"{share:.1%} of the blocks' weights: model.layers.*"
    assert any(f"Stays dense (excluded): {line}" in record.message for record in caplog.records) == said
    if said:
        assert line in str(report) and type(report).from_dict(report.to_dict()).dense_sizes == report.dense_sizes


def test_a_pattern_that_fits_not_all_names_all_that_it_does_not_fit_with_their_share():
    model = tiny_llama(intermediate_size=46)
    with pytest.raises(ValueError, match="divisible by 4, got 46") as error:
        architecture_for(model, DSAConfig(0.5, pattern="2:4", allocation="uniform"))
    total = sum(weight.size for weight in architecture_for(model, DSAConfig(0.5)).weights)
    share = 3 * 46 * 32 / total
    assert f"exclude=['model.layers.*.mlp.down_proj.weight'] ({share:.1%} of the blocks' weights" in str(error.value)
    config = DSAConfig(0.5, pattern="2:4", allocation="uniform", exclude=["model.layers.*.mlp.down_proj.weight"])
    assert set(architecture_for(model, config).dense.values()) == {"excluded"}


@pytest.mark.parametrize("blocks", [(), ("vision_model.encoder.layers",)])
def test_blocks_of_another_tower_are_said_unless_the_user_chose(blocks, caplog):
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2}
    text = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "max_position_embeddings": 16, **sizes}
    vision = {"hidden_size": 32, "intermediate_size": 60, "image_size": 16, "patch_size": 4, **sizes}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with caplog.at_level(logging.WARNING):
        report = prune(model, None, DSAConfig(0.5, "magnitude", "uniform", blocks=blocks))
    left = sum(parameter.numel() for parameter in model.vision_model.encoder.layers.parameters())
    share = left / (left + sum(report.allocation.sizes.values()))
    line = f"Other blocks stay dense: {share:.1%} of the blocks' weights: vision_model.encoder.layers"
    assert any(line in record.message for record in caplog.records) == (not blocks)
