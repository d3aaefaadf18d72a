"""Pictures and sound in calibration: what a processor returns is walked as the model runs it, whole or in a list."""

import pytest
import torch
import transformers as tf

from optimum_dsa import DSAConfig, DSAPruner, load_calibration
from optimum_dsa.model.architecture import find_architecture
from optimum_dsa.model.padding import Whole, is_whole, sample_count

from ..conftest import IMAGE_TOKEN, SIZES, VISION, VOCABULARY
from ..plain_walk import check_equal, plain, walked
from .test_architecture import Toy, layers
from .test_inputs import clip


TEXT = {**SIZES, "num_hidden_layers": 3}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def qwen(name="Qwen2_5_VL"):
    """A tiny model of the Qwen-VL family: 4 patches of a picture become one token."""
    text = {**TEXT, "rope_parameters": ROPE, "tie_word_embeddings": False}
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    if name == "Qwen2_VL":
        vision = {**sizes, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 32}
    else:
        vision = {**sizes, "out_hidden_size": 32, "intermediate_size": 48}
    if name == "Qwen3_VL":
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    if name == "Qwen2_5_VL":
        vision |= {"fullatt_block_indexes": [1], "window_size": 16}
    config = getattr(tf, f"{name.replace('_', '')}Config" if name != "Qwen2_5_VL" else "Qwen2_5_VLConfig")
    torch.manual_seed(0)
    made = config(text_config=text, vision_config=vision, **TOKENS)
    return tf.AutoModelForImageTextToText.from_config(made).eval()


def prompt(pictures, words=6, seed=0):
    """What a processor of the Qwen-VL family returns for one prompt with so many pictures of 4 by 4 patches."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for _ in range(pictures):
        ids += [92, *[IMAGE_TOKEN] * 4, 93]
    ids += torch.randint(3, 80, (words,), generator=generator).tolist()
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    if pictures:
        batch["pixel_values"] = torch.randn(16 * pictures, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * pictures)
    return batch


@pytest.mark.contract
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", ["Qwen2_VL", "Qwen2_5_VL", "Qwen3_VL"])
def test_a_walk_over_prompts_with_pictures_equals_the_plain_forward(name, sequential):
    """Qwen3-VL adds what its vision tower sees on the way to the tokens between blocks."""
    model, batches = qwen(name), [prompt(2), prompt(1, seed=1), prompt(0, 9, seed=2)]
    expected = plain(model, find_architecture(model), *batches)
    check_equal(walked(model, batches, sequential=sequential), expected)


def test_what_a_processor_returns_for_several_prompts_is_one_batch():
    model, (one, other) = qwen(), (prompt(2, 6), prompt(1, 12, seed=1))
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    assert len({len(value) for value in both.values()}) == 3
    found = load_calibration(tf.BatchFeature(both), model)
    assert found.facts() == {"source": "tensor", "samples": 2, "length": 18, "tokens": 36, "seed": None}
    assert is_whole(found.batches(1)[0]) and sample_count(found.batches(1)[0]) == 2
    statistics = walked(model, found.batches(8))
    check_equal(statistics, plain(model, find_architecture(model), both))
    assert {each.sequences for each in statistics.values()} == {2}


@pytest.mark.parametrize("method,allocation", [("wanda", "dsa"), ("sparsegpt", "uniform")])
def test_a_list_of_what_a_processor_returns_calibrates(method, allocation):
    pruner = DSAPruner(qwen("Qwen3_VL"))
    report = pruner.prune([prompt(2), prompt(0), prompt(1)], DSAConfig(0.5, method, allocation))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3) and not report.unseen
    assert (report.calibration["samples"], report.calibration["source"]) == (3, "3 batches")
    assert report.calibration["tokens"] == 18 + 6 + 12 and report.calibration["length"] is None


def test_blocks_are_trained_on_prompts_with_pictures():
    pruner = DSAPruner(qwen())
    report = pruner.prune([prompt(1, seed=seed) for seed in range(3)], DSAConfig(0.5, reconstruct=2))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match="num_samples of at least 2"):
        DSAPruner(qwen()).prune([prompt(1)], DSAConfig(0.5, reconstruct=2))


def test_batches_that_are_alike_are_cut_as_one(tiny, inputs):
    whole = inputs("llava", samples=4)
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(2), slice(2, 4))]
    found = load_calibration(halves, tiny("llava"))
    assert not found.parts and all(torch.equal(value, whole[name]) for name, value in found.inputs.items())
    images = torch.randn(4, 3, 8, 8)
    assert len(load_calibration([{"pixel_values": images}] * 2, tiny("vit")).batches(8)[0]["pixel_values"]) == 8


def test_as_many_pictures_as_prompts_may_be_two_in_one_prompt_and_none_in_another(tiny, inputs):
    model, batch = tiny("llava"), inputs("llava", samples=2)
    ids = batch["input_ids"].clone()
    ids[0, 4:8], ids[1, :4] = IMAGE_TOKEN, 5
    found = load_calibration({**batch, "input_ids": ids}, model)
    assert isinstance(found.batches(1)[0], Whole)
    check_equal(walked(model, found.batches(1)), plain(model, find_architecture(model), {**batch, "input_ids": ids}))


def test_padding_of_prompts_with_pictures_does_not_count():
    model, (one, other) = qwen(), (prompt(1, 9), prompt(1, 5, seed=1))
    padded = {name: torch.nn.functional.pad(other[name], (4, 0)) for name in other if other[name].shape[1] == 11}
    both = {name: torch.cat([one[name], {**other, **padded}[name]]) for name in one}
    statistics = walked(model, load_calibration(both, model).batches(8))
    assert {each.tokens for each in statistics.values()} == {15 + 11}


def mllama():
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text.pop("head_dim")
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 8, "patch_size": 4, "intermediate_layers_indices": [0],
        "vision_output_dim": 64, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    config = tf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    torch.manual_seed(0)
    return tf.MllamaForConditionalGeneration(config).eval()


def test_blocks_that_a_text_does_not_run_are_said_and_scored_without_inputs(caplog):
    model = mllama()
    ids = torch.randint(3, 80, (3, 8), generator=torch.Generator().manual_seed(0))
    check_equal(walked(model, [{"input_ids": ids}]), plain(model, find_architecture(model), {"input_ids": ids}))
    assert "runs no model.language_model.layers.1 on its first calibration sample" in caplog.text
    report = DSAPruner(model).prune(ids, DSAConfig(0.5, "wanda", "uniform"))
    assert report.unseen and all(".layers.1." in name for name in report.unseen)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "between", [lambda hidden: hidden + 1, lambda hidden: hidden.add_(1)], ids=["new", "in place"]
)
def test_what_is_added_between_blocks_is_added_in_the_walk(between):
    model, batch = Toy(layers(), between=between), {"input_ids": torch.arange(12).view(2, 6)}
    check_equal(walked(model, [batch]), plain(model, find_architecture(model), batch))


def test_clip_is_pruned_with_its_own_inputs():
    model = clip()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(3, 3, VISION["image_size"], VISION["image_size"], generator=generator),
    }
    report = DSAPruner(model).prune(batch, DSAConfig(0.5, "wanda", "uniform"))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3) and not report.unseen


def test_inputs_that_do_not_belong_together_are_refused_still():
    model = qwen()
    for batch, message in (
        ({**prompt(1), "attention_mask": torch.ones(2, 12)}, "same number of samples, at least 1; got \\[1, 2\\]"),
        ({**prompt(1), "pixel_values": torch.zeros(0, 96)}, "pixel_values has none"),
    ):
        with pytest.raises(ValueError, match=message):
            load_calibration(batch, model)
