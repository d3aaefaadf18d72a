from collections import defaultdict

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from torch import nn

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.model.architecture import UnprunableError, find_architecture
from optimum_dsa.model.calls import capture_calls, feed
from optimum_dsa.model.padding import without_padding
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.unstructured.patterns import Pattern

from ..conftest import FAMILIES, VOCABULARY, vision_language
from ..plain_walk import Inputs, check_equal, check_same_state, hooks, plain, split, state, walked
from .test_architecture import Layer, Toy


EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jetmoe", "llama4", "dbrx"]


@pytest.mark.contract
@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_that_changes_nothing_equals_the_plain_forward(family, sequential, tiny, inputs):
    model = tiny(family)
    found = find_architecture(model)
    batch = inputs(family)
    expected = plain(model, found, batch)
    before = state(model)
    statistics = walked(model, split(batch, 3), gram=sequential, sequential=sequential)
    check_equal(statistics, expected, gram=sequential)
    assert {each.sequences for each in statistics.values()} == {6}
    assert expected.keys() <= statistics.keys() == {weight.name for weight in found.weights}
    check_same_state(model, before)


@pytest.mark.parametrize("how", ["stops", "raises", "inside"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_a_walk_cut_short_leaves_the_model_as_it_was(family, how, tiny, inputs):
    model = tiny(family).train()
    model.get_submodule(find_architecture(model).blocks[0].name).eval()  # modes may be mixed
    if family == "mixtral":
        model.config._experts_implementation = "grouped_mm"
    before = state(model)
    batch = inputs(family)
    if how == "inside":
        batch = {"input_ids": batch["input_ids"] + VOCABULARY}  # the model itself fails
    try:
        for _ in walk_blocks(model, find_architecture(model), [batch]):
            if how == "raises":
                raise KeyboardInterrupt
            break
    except (KeyboardInterrupt, ValueError):
        assert how != "stops"
    else:
        assert how == "stops"
    check_same_state(model, before)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_any_size_give_the_same_statistics(family, size, tiny, inputs):
    model, batch = tiny(family), inputs(family)
    expected = walked(model, split(batch, 3))
    for name, found in walked(model, split(batch, size)).items():
        torch.testing.assert_close(found.squared_sum, expected[name].squared_sum, rtol=1e-4, atol=1e-6, msg=name)
        assert (found.tokens, found.sequences) == (expected[name].tokens, expected[name].sequences)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss", "t5", "vit"])
def test_batches_of_any_size_give_the_same_masks(family, tiny, inputs):
    masks = []
    for size in (1, 3, 8):
        model = tiny(family)
        DSAPruner(model).prune(inputs(family), DSAConfig(sparsity=0.5, batch_size=size))
        masks.append({weight.name: weight.tensor(model) == 0 for weight in find_architecture(model).weights})
    assert all(torch.equal(mask, other[name]) for name, mask in masks[0].items() for other in masks[1:])


def padded(tokens, lengths, side="right"):
    """Sequences of several lengths, one by one and as one padded batch."""
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    sequences = [{"input_ids": row[keep][None]} for row, keep in zip(tokens, mask)]
    return sequences, {"input_ids": tokens.where(mask, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.feed == "text"])
def test_padding_does_not_count(family, tiny, inputs):
    model = tiny(family)
    found = find_architecture(model)
    sequences, batch = padded(inputs(family)["input_ids"], [12, 5, 9, 12, 1, 5])
    statistics = walked(model, [batch])
    check_equal(statistics, plain(model, found, *sequences))
    assert {each.sequences for each in statistics.values()} == {6}


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "bloom"])
def test_a_padded_batch_gives_what_a_plain_forward_gives_at_its_tokens(family, tiny, inputs):
    model = tiny(family)
    found = find_architecture(model)
    _, batch = padded(inputs(family)["input_ids"], [12, 5, 9, 12, 1, 5])
    keep = batch["attention_mask"].bool()

    class Kept(Inputs):
        def add(self, name, inputs):
            super().add(name, inputs.reshape(*keep.shape, -1)[keep])

    expected = Kept()
    with torch.no_grad(), hooks(model, found, expected):
        feed(model, batch)
    check_equal(walked(model, [batch]), expected)


def test_padding_is_cut_on_either_side_and_for_decoders_on_their_own():
    tokens = torch.arange(1, 13).view(2, 6)
    _, left = padded(tokens, [6, 4], "left")
    parts = without_padding(left | {"position_ids": tokens, "pixel_values": torch.arange(2)})
    assert [part["input_ids"].tolist() for part in parts] == [[[1, 2, 3, 4, 5, 6]], [[9, 10, 11, 12]]]
    assert [part["position_ids"].shape[1] for part in parts] == [6, 4]
    assert [part["pixel_values"].tolist() for part in parts] == [[0], [1]]
    _, right = padded(tokens, [3, 3])
    both = left | {f"decoder_{name}": value for name, value in right.items()}
    shapes = [(part["input_ids"].shape[1], part["decoder_input_ids"].shape[1]) for part in without_padding(both)]
    assert shapes == [(6, 3), (4, 3)]
    with pytest.raises(ValueError, match="every token"):
        without_padding({"input_ids": tokens, "attention_mask": torch.zeros_like(tokens)})


def test_an_encoder_and_its_decoder_are_padded_each_by_its_own_mask(tiny, inputs):
    model = tiny("t5")
    tokens = inputs("t5")["input_ids"][:3]
    sources, batch = padded(tokens, [12, 7, 7])
    targets, answers = padded(tokens.flip(0), [4, 12, 9])
    single = [source | {"decoder_input_ids": target["input_ids"]} for source, target in zip(sources, targets)]
    batch |= {f"decoder_{name}": value for name, value in answers.items()}
    check_equal(walked(model, [batch]), plain(model, find_architecture(model), *single))


def test_padding_of_embeddings_does_not_count(tiny, inputs):
    model = tiny("llama")
    sequences, batch = padded(inputs("llama")["input_ids"], [12, 5, 9, 12, 1, 5])
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    given = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"]}
    check_equal(walked(model, [given]), plain(model, find_architecture(model), *sequences))


def test_padding_of_a_recording_does_not_count():
    config = tf.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, conv_dim=(16, 16),
        conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
    )  # fmt: skip
    model = tf.Wav2Vec2Model(config).eval()
    sound = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(400) < torch.tensor([400, 210, 400])[:, None]
    batch = {"input_values": sound * mask, "attention_mask": mask.long()}
    single = [{"input_values": row[keep][None]} for row, keep in zip(sound, mask)]
    found = walked(model, [batch])
    check_equal(found, plain(model, find_architecture(model), *single))
    lengths = model._get_feat_extract_output_lengths(mask.sum(1))
    assert {each.tokens for each in found.values()} == {int(lengths.sum())}


def test_holes_between_tokens_do_not_count(tiny, inputs):
    model, batch = tiny("llama"), inputs("llama")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 3:5] = mask[2, 7] = mask[3, 0] = 0
    found = walked(model, [{**batch, "attention_mask": mask}])
    assert {each.tokens for each in found.values()} == {int(mask.sum())}

    class Kept(Inputs):
        def add(self, name, inputs):
            super().add(name, inputs.reshape(*mask.shape, -1)[mask.bool()])

    expected = Kept()
    with torch.no_grad(), hooks(model, find_architecture(model), expected):
        feed(model, {**batch, "attention_mask": mask})
    first = {name: each for name, each in found.items() if ".layers.0." in name and "_proj" in name}
    assert first and all(found[name].tokens == int(mask.sum()) for name in first)


@pytest.mark.parametrize("family,message", [("mixtral", "cannot be told from the tokens"), ("t5", "encoder-decoder")])
def test_holes_that_cannot_be_told_are_refused(family, message, tiny, inputs):
    model, batch = tiny(family), inputs(family)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 3] = 0
    with pytest.raises(ValueError, match=message):
        walked(model, [{**batch, "attention_mask": mask}])


@pytest.mark.contract
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_watched_behind_fused_kernels(family, implementation, tiny, inputs):
    model, batch = tiny(family), inputs(family)
    model.config._experts_implementation = implementation
    check_equal(walked(model, [batch]), plain(model, find_architecture(model), batch))
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_share_out_the_tokens(family, tiny, inputs):
    statistics = walked(tiny(family), [inputs(family)])
    routed = defaultdict(int)
    for name, each in statistics.items():
        if name.endswith("]"):
            routed[name.rpartition("[")[0]] += each.tokens
    assert set(routed.values()) == {6 * 12 * 2}  # two experts per token


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_no_token_reached_are_scored_by_magnitude_and_named(family, tiny, inputs):
    model = tiny(family)
    found = find_architecture(model)
    batch = {"input_ids": inputs(family)["input_ids"][:1, :1]}  # one token reaches two of four experts
    reached = plain(model, found, batch)
    expected = {weight.name for weight in found.weights if weight.name not in reached}
    report = DSAPruner(model).prune(batch, DSAConfig(sparsity=0.5, allocation="uniform", sequential=False))
    assert set(report.unseen) == expected
    experts = [weight for weight in found.weights if weight.expert is not None]
    assert len(expected) == len(experts) // 2
    for weight in experts:
        dense, pruned = weight.tensor(tiny(family)), weight.tensor(model)
        by_magnitude = Pattern("row").keep(dense.abs(), int((pruned == 0).sum()))
        assert torch.equal(pruned != 0, by_magnitude) == (weight.name in expected)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_no_token_reached_have_scores_of_the_scale_of_the_others(family, tiny, inputs):
    """Or an allocator that compares scores would take them for other matrices than they are."""
    found = walked(tiny(family), [{"input_ids": inputs(family)["input_ids"][:1, :1]}])
    experts = [name for name in found if name.endswith("]")]
    unseen = [name for name in experts if not found[name].tokens]
    assert unseen and len(unseen) < len(experts)
    for name in unseen:
        kin = [found[other] for other in experts if other.rpartition("[")[0] == name.rpartition("[")[0]]
        mean = torch.stack([each.squared_sum for each in kin if each.tokens]).mean().sqrt()
        torch.testing.assert_close(found[name].input_norm, mean.expand_as(found[name].input_norm))


def test_included_head_sees_its_real_input(tiny, inputs):
    model, batch = tiny("llama"), inputs("llama")
    found = find_architecture(model, include=["lm_head"])
    for block in walk_blocks(model, found, split(batch, 2)):
        check_equal(dict(block.statistics), plain(model, found, batch))
        for weight in block.weights:
            block.tensor(weight).mul_(0.5)
    assert block.name == found.head.name and block.statistics["lm_head.weight"].tokens == 72


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma4", "mixtral", "jetmoe", "bert", "t5", "whisper", "llava"])
def test_sequential_each_block_sees_what_the_pruned_ones_before_it_give(family, tiny, inputs):
    model, batch = tiny(family), inputs(family)
    found = find_architecture(model)
    for block in walk_blocks(model, found, split(batch, 4)):
        check_equal(dict(block.statistics), plain(model, found, batch))
        for weight in block.weights:
            block.tensor(weight)[:, ::2] = 0
            block.changed(weight)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma4", "mixtral", "jetmoe", "bert", "t5", "whisper", "llava"])
def test_not_sequential_each_block_sees_what_the_dense_ones_give(family, tiny, inputs):
    model, batch = tiny(family), inputs(family)
    found = find_architecture(model)
    expected = plain(model, found, batch)
    for block in walk_blocks(model, found, split(batch, 4), sequential=False):
        check_equal(dict(block.statistics), expected)
        for weight in block.weights:
            block.tensor(weight)[:, ::2] = 0
    assert all((weight.tensor(model)[:, ::2] == 0).all() for weight in found.weights)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_walk_works_in_inference_mode(family, tiny, inputs):
    with torch.inference_mode():
        report = DSAPruner(tiny(family)).prune(inputs(family), DSAConfig(sparsity=0.5))
    assert report.sparsity == 0.5


def test_a_walk_does_not_need_the_losses_of_routers(tiny, inputs):
    model = tiny("mixtral")
    model.config.output_router_logits = True
    found = find_architecture(model, include=["lm_head"])
    assert len(list(walk_blocks(model, found, [inputs("mixtral")]))) == 3


@pytest.mark.contract
def test_a_language_model_that_starts_a_cache_of_its_own_is_walked_without(inputs):
    torch.manual_seed(0)
    model = vision_language("AyaVision", "Siglip", "Cohere2", {}, downsample_factor=1).make().eval()
    assert not hasattr(model.config, "use_cache") and model.config.text_config.use_cache
    batch = inputs("aya_vision")
    check_equal(walked(model, [batch]), plain(model, find_architecture(model), batch))


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_offloaded_weights_are_walked_as_resident_ones(family, tiny, inputs):
    batch = inputs(family)
    model = cpu_offload(tiny(family), execution_device="cpu")
    resident = tiny(family)
    check_equal(walked(model, split(batch, 3)), plain(resident, find_architecture(resident), batch))


def test_masks_are_kept_once(tiny, inputs):
    model = tiny("gemma3")
    calls = capture_calls(model, find_architecture(model).stacks[0], split(inputs("gemma3"), 2))
    first, second, third = calls.arguments
    local, other = first[0][1]["attention_mask"], first[1][1]["attention_mask"]
    assert local is not None and local is second[0][1]["attention_mask"] is third[2][1]["attention_mask"]
    assert other is None or not torch.equal(local, other)


def test_experts_stored_the_other_way_round_are_refused(tiny, inputs):
    model = tiny("gpt_oss")
    model.config._experts_implementation = "eager"
    model.model.layers[0].mlp.experts.is_transposed = False
    with pytest.raises(UnprunableError, match="is_transposed"):
        walked(model, [inputs("gpt_oss")])


def test_experts_in_one_storage_are_told_apart(tiny, inputs):
    """A checkpoint mapped into memory is one storage for all parameters."""
    model, batch = tiny("mixtral"), inputs("mixtral")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        both = torch.cat([experts.gate_up_proj.data.flatten(), experts.down_proj.data.flatten()])
        size = experts.gate_up_proj.numel()
        experts.gate_up_proj.data = both[:size].view_as(experts.gate_up_proj)
        experts.down_proj.data = both[size:].view_as(experts.down_proj)
    check_equal(walked(model, [batch]), plain(model, find_architecture(model), batch))


class Einsum(nn.Module):
    """Experts in one parameter whose product nobody looks for."""

    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.maps = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, hidden_states):
        return torch.einsum("bsi,eoi->bso", hidden_states, self.maps)


def test_experts_that_cannot_be_watched_are_refused_with_a_way_out_and_what_it_costs():
    class Mixed(Layer):
        def forward(self, hidden_states):
            return hidden_states + self.experts(self.map(hidden_states))

    model = Toy(nn.ModuleList(Mixed(8, experts=Einsum()) for _ in range(2)))
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    with pytest.raises(UnprunableError, match=r"could not be observed.*exclude=\['experts'\], 75\.0% of this block"):
        walked(model, [batch])
    found = find_architecture(model, exclude=["experts"])
    assert len(list(walk_blocks(model, found, [batch]))) == 2


def test_infinities_are_named(tiny, inputs):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        walked(model, [inputs("llama")])


class Remembering(Layer):
    """A block whose output depends on what was said in earlier calls."""

    def forward(self, hidden_states, past_key_values=None):
        if past_key_values is not None:
            past, _ = past_key_values.update(hidden_states[:, None], hidden_states[:, None], layer_idx=0)
            hidden_states = hidden_states + past.shape[2]
        return hidden_states + self.map(hidden_states)


def test_blocks_are_run_again_without_what_they_remember():
    class Forgetful(Toy):
        def forward(self, input_ids):
            hidden, cache = self.embedding(input_ids), tf.DynamicCache()
            for layer in self.layers:
                hidden = layer(hidden, past_key_values=cache)
            return hidden

    model = Forgetful(nn.ModuleList(Remembering(8) for _ in range(3)))
    without = Toy(model.layers)
    without.embedding = model.embedding
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    check_equal(walked(model, [batch]), plain(without, find_architecture(without), batch))
