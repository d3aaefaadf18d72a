"""Whole blocks that go: the model without them is the one in which they hand their input on, and a plain model."""

import copy
from dataclasses import replace

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.model.parameters import count_parameters
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.prune import prune_structures
from optimum_dsa.pruning.structured.slicing import cut_out, silence
from optimum_dsa.pruning.structured.wholes.blocks import find_blocks
from optimum_dsa.pruning.structured.wholes.usage import collect_usage

from ....tiny import same_state, state
from ..families import EVERY, batch_of, deeper


DEPTH = 4


def blocks_of(model, family):
    return find_blocks(model, find_architecture(model), batch_of(family))


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("family", EVERY)
def test_the_model_without_blocks_gives_what_it_gives_when_they_hand_their_input_on(family, tmp_path):
    model = deeper(family, DEPTH)
    before, config = state(model), model.config.to_dict()
    found = blocks_of(model, family)
    assert same_state(model, before) and model.config.to_dict() == config
    silenced, cut, batch = copy.deepcopy(model), copy.deepcopy(model), batch_of(family, samples=2)
    for each in found.structures.values():
        assert len(each) == DEPTH and each.kind == "block"
        # Of T5 the first has the bias of positions of all.
        assert each.fixed == ((0,) if family == "T5" else ())
        gone = torch.tensor([1, 2])
        silence(silenced, each, gone)
        cut_out(cut, each, gone)
        assert count_parameters(cut) < count_parameters(model)
    torch.testing.assert_close(logits(cut, batch), logits(silenced, batch), rtol=1e-4, atol=1e-5)
    assert (logits(cut, batch) - logits(model, batch)).abs().max() > 1e-3
    cut.save_pretrained(tmp_path)
    loaded, told = type(cut).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    torch.testing.assert_close(logits(loaded, batch), logits(cut, batch))


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
def test_a_shallower_model_generates_with_its_cache(family):
    model = deeper(family, DEPTH)
    prune_structures(model, batch_of(family, 2), DSAStructuredConfig(0.5, ("block",)))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt = batch_of(family)["input_ids"]
    assert torch.equal(
        model.generate(prompt, use_cache=True, **options), model.generate(prompt, use_cache=False, **options)
    )


def test_what_is_listed_by_block_is_of_those_that_stay():
    model = deeper("Gemma2", DEPTH)
    model.config.layer_types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    unit = next(iter(blocks_of(model, "Gemma2").structures.values()))
    cut_out(model, unit, torch.tensor([0, 2]))
    assert model.config.layer_types == ["full_attention", "sliding_attention"] and model.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_what_is_listed_is_of_those_that_went():
    model, batch = deeper("Gemma2", DEPTH), batch_of("Gemma2", 2)
    listed = list(model.config.layer_types)
    report = prune_structures(model, batch, DSAStructuredConfig(0.5, ("block",), exclude=["layers.3"]))
    gone = report.gone["model.layers:block"]
    assert len(gone) == 2 and 3 not in gone and report.left["model.layers.3.mlp.up_proj.weight"].endswith("excluded")
    assert model.config.layer_types == [each for number, each in enumerate(listed) if number not in gone]


def test_the_blocks_that_turn_their_tokens_least_go():
    model, batch, seen = deeper("Llama", DEPTH), batch_of("Llama", 3), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    logits(model, batch)
    turned = torch.stack([1 - torch.cosine_similarity(*each, dim=-1).mean() for each in seen])
    unit = blocks_of(model, "Llama").structures["model.layers:block"]
    usage = collect_usage(model, {unit.unit: unit}, [batch])[unit.unit]
    torch.testing.assert_close(usage.output / usage.tokens, turned, rtol=1e-4, atol=1e-6)
    report = prune_structures(model, batch, DSAStructuredConfig(0.5, ("block",)))
    assert list(report.gone["model.layers:block"]) == turned.argsort()[:2].sort().values.tolist()
    assert report.removed == 2 * report.costs["model.layers:block"] and report.sparsity == 0.5
    assert str(report).endswith("block: 2 of 4 stay")


def test_blocks_that_have_to_stay_do():
    model = deeper("T5", DEPTH)
    found = blocks_of(model, "T5")
    left = [why for name, why in found.left.items() if name.startswith("encoder.block.0.") and why != "embedding"]
    assert left and all(why.startswith("its block cannot go: ") for why in left)
    report = prune_structures(model, batch_of("T5", 2), DSAStructuredConfig(0.5, ("block",), "random"))
    assert all(gone and 0 not in gone for gone in report.gone.values()) and len(report.gone) == 2
    assert model.config.num_layers == model.config.num_decoder_layers == 2


def test_one_of_every_make_stays():
    """Of a hybrid a block with attention, without which no cache can tell how long it is."""
    model = deeper("Lfm2", DEPTH)
    report = prune_structures(model, batch_of("Lfm2", 2), DSAStructuredConfig(0.5, ("block",), "random"))
    assert len(report.gone["model.layers:block"]) == 2 and sorted(model.config.layer_types) == [
        "conv",
        "full_attention",
    ]
    assert model.generate(batch_of("Lfm2")["input_ids"], max_new_tokens=2, pad_token_id=0).shape == (1, 14)


def test_a_block_of_each_stack_stays():
    model = deeper("Llama", DEPTH)
    before = state(model)
    with pytest.raises(ValueError, match="of the structures that may only .* can"):
        prune_structures(model, batch_of("Llama", 2), DSAStructuredConfig(0.9, ("block",)))
    with pytest.raises(ValueError, match="model.layers:block has 4 structures and 4 are to go; leave one at least"):
        cut_out(model, blocks_of(model, "Llama").structures["model.layers:block"], torch.arange(4))
    assert same_state(model, before)


def test_a_learner_has_no_gate_for_what_goes_whole():
    with pytest.raises(ValueError, match="A learner is of channels and heads, and 'block' is to go"):
        DSAStructuredConfig(0.2, ("block",), learner="projected_gates")


@pytest.mark.parametrize(
    ("structures", "importance", "message"),
    [
        (("ffn", "block"), "wanda_sp", "Blocks go alone"),
        (("ffn",), "block_influence", "importance='block_influence' is of 'block' .*, and 'ffn' is to go"),
    ],
)
def test_settings_that_mean_nothing_for_blocks_are_refused(structures, importance, message):
    with pytest.raises(ValueError, match=message):
        DSAStructuredConfig(0.2, structures, importance)


def test_blocks_of_which_every_one_is_of_another_make_stay():
    with pytest.raises(ValueError, match="has no block that could be cut out .model.layers: one block of every make"):
        prune_structures(EVERY["Lfm2"][0](), batch_of("Lfm2", 2), DSAStructuredConfig(0.5, ("block",)))


def test_more_blocks_than_can_go_with_the_first_ones_kept_are_refused():
    """One with attention has to stay, and neither of the kept ones has it."""
    model = EVERY["Lfm2"][0](num_hidden_layers=4, full_attn_idxs=[3])
    before, config = state(model), DSAStructuredConfig(0.5, ("block",), keep_first=2)
    assert prune_structures(copy.deepcopy(model), batch_of("Lfm2", 2), replace(config, sparsity=0.25)).removed > 0
    with pytest.raises(ValueError, match="2 are to go, and only 1 of 4 can"):
        prune_structures(model, batch_of("Lfm2", 2), config)
    assert same_state(model, before)
