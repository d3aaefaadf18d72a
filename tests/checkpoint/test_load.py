"""Which class loads a checkpoint, and how much its configuration may ask for."""

import gc
import json
import resource
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_dsa import DSAConfig, DSAPruner, plan
from optimum_dsa.checkpoint.limits import LAYERS, Contents, check_counts, read_contents, within
from optimum_dsa.checkpoint.load import load_model, load_tokenizer
from optimum_dsa.commands.embedded import demo_model
from optimum_dsa.model.model_class import model_class
from optimum_dsa.model.offload import is_offloaded

from ..conftest import FAMILIES
from ..tiny import same_state, state, tiny_llama


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that nobody pruned."""
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_tokenizer_is_found_at_a_path_of_either_kind():
    for source in (Path(demo_model()), str(demo_model())):
        assert load_tokenizer(source)("x = 1").input_ids
        assert DSAPruner.from_pretrained(tiny_llama(), tokenizer=source).tokenizer("x = 1").input_ids


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The cache of a Hub that has the checkpoint as me/tiny, without a network."""
    repository = tmp_path / "hub" / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("a" * 40)).symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "me/tiny"


def change(folder, **facts):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **facts}))


def refused(path, message, seconds=5.0):
    """Loading `path` ends soon, in a `ValueError`, and without memory growing."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=message):
        load_model(str(path))
    assert time.process_time() - began < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KB


# -- which class


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_model_is_loaded_by_its_own_class(family, tiny):
    model = tiny(family)
    config = type(model.config).from_dict({**model.config.to_dict(), "architectures": [type(model).__name__]})
    assert model_class(config, "here") is type(model)


@pytest.mark.parametrize(
    "name,message",
    [
        ("pipeline", "is no model class"),
        ("TrainingArguments", "is no model class"),
        ("AutoModelForCausalLM", "is no model class"),
        ("LlamaConfig", "is no model class"),
        ("models", "is no model class"),
        ("__name__", "is no model class"),
        ("PreTrainedModel", "only the base of model classes"),
        ("LlamaPreTrainedModel", "only the base of model classes"),
        ("GPT2LMHeadModel", "its model_type is 'llama', which that class does not load"),
        (7, "expected a list of names|is none that transformers reads"),
        (["LlamaForCausalLM"], "expected a list of names|is none that transformers reads"),
    ],
)
def test_what_is_no_model_class_is_neither_called_nor_read(folder, monkeypatch, name, message):
    change(folder, architectures=[name])
    refused(folder, message)


@pytest.mark.parametrize("names", [None, [], ["OwnModelForCausalLM"], ["OwnModel", "LlamaForCausalLM"]])
def test_what_transformers_does_not_have_is_left_to_its_configuration(folder, names):
    before = state(tiny_llama())
    change(folder, architectures=names)
    assert same_state(load_model(str(folder)), before)


WHOLE = {
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "llava": "LlavaForConditionalGeneration",
    "vit": "ViTModel",
}


@pytest.mark.parametrize("names", [None, ["ModelOfNobody"]])
@pytest.mark.parametrize("family", WHOLE)
def test_a_model_whose_class_nobody_names_is_loaded_whole(family, names, tiny, tmp_path, caplog):
    """Not its decoder alone, under a head that it was not made for."""
    tiny(family).save_pretrained(tmp_path)
    change(tmp_path, architectures=names)
    assert type(load_model(str(tmp_path))).__name__ == WHOLE[family]
    assert ("has no architectures: it is" if names is None else "none of which transformers has") in caplog.text


@pytest.mark.parametrize("name", ["Foo", "LlamaForRewardModel"])
def test_a_class_that_transformers_does_not_have_is_said(folder, name, caplog):
    change(folder, architectures=[name])
    load_model(str(folder))
    assert f"architectures=['{name}'], none of which transformers has" in caplog.text


def test_a_model_that_is_nowhere_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    for open_ in (load_model, lambda path: plan(path, DSAConfig(0.5), run_block=False)):
        with pytest.raises(OSError, match="no-such-model"):
            open_("no-such-model")


def test_whole_numbers_that_nothing_explains_are_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight \(I8\).* no quantization_config"):
        load_model(str(folder))


def test_what_it_has_and_its_class_does_not_know_is_kept_and_said(tiny, tmp_path, caplog):
    tiny("vit").save_pretrained(tmp_path / "base")
    change(tmp_path / "base", architectures=None)
    pruner = DSAPruner.from_pretrained(tmp_path / "base")
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    assert "has 2 tensors that ViTModel does not know" in caplog.text
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(again.classifier.weight, tiny("vit").classifier.weight)


# -- how much


BOMBS = {
    "layers": ({"num_hidden_layers": 4000}, "says num_hidden_layers=4,000, and the checkpoint has 30 tensors"),
    "layers beyond memory": ({"num_hidden_layers": 10**12}, "says num_hidden_layers=1,000,000,000,000"),
    "nested": ({"text_config": {"decoder_layers": 10**9}}, "says decoder_layers=1,000,000,000"),
    "labels": ({"num_labels": 10**10}, "says num_labels=10,000,000,000"),
    "layers that are few enough": (
        {"num_hidden_layers": LAYERS, "hidden_size": 8, "head_dim": 2, "intermediate_size": 8},
        "asks for .* (tensors|modules) or more",
    ),
    "hidden": ({"hidden_size": 10**6, "head_dim": 8}, "asks for .* parameters or more, and the checkpoint has"),
    "vocabulary": ({"vocab_size": 10**10}, "asks for .* parameters or more"),
    "wrong type": ({"num_hidden_layers": "many"}, "config.json of .* is none that transformers reads"),
    "negative": ({"hidden_size": -8}, "."),
}


@pytest.mark.parametrize("form", ["plain", "pruned", "compressed", "hub"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_configuration_asks_for_no_more_than_its_weights(folder, hub, tmp_path, bomb, form):
    path, asked = (hub if form == "hub" else folder), BOMBS[bomb]
    if form in ("pruned", "compressed"):
        pruner = DSAPruner(tiny_llama())
        pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
        pruner.save_pretrained(tmp_path / form, compressed=form == "compressed")
        path = tmp_path / form
    change(folder if form == "hub" else path, **asked[0])
    refused(path, asked[1])


def test_a_hub_model_is_loaded_from_the_cache(hub):
    assert same_state(load_model(hub), state(tiny_llama()))


def test_tables_beyond_memory_are_no_weights_but_are_counted(tmp_path):
    config = transformers.GPTNeoConfig(
        vocab_size=97, hidden_size=8, num_layers=2, attention_types=[[["global"], 2]], num_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    load_model(str(tmp_path))
    change(tmp_path, max_position_embeddings=10**5)  # a mask of 10^10 bytes in each layer
    refused(tmp_path, "bytes of buffers or more|parameters or more")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_within_the_limits(family, tiny, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)


def test_quantised_weights_are_more_than_their_numbers(tmp_path):
    contents = Contents(tensors=3, weights=None, widest=8)
    with within(contents, "here"):
        torch.nn.Linear(4096, 4096, device="meta")
    with (
        pytest.raises(
            ValueError, match="asks for 16,777,216 parameters or more, and the checkpoint has 24 weights in 3"
        ),
        within(Contents(3, 24, 8), "here"),
    ):
        torch.nn.Linear(4096, 4096, device="meta")
    torch.nn.Linear(4096, 4096, device="meta")  # outside, nothing is counted


def test_the_headers_are_counted(tmp_path):
    save_file({"a": torch.zeros(4, 6), "b": torch.zeros(9), "c": torch.zeros(())}, tmp_path / "x.safetensors")
    assert read_contents([tmp_path / "x.safetensors"]) == Contents(3, 34, 9)
    assert load_file(tmp_path / "x.safetensors")["a"].shape == (4, 6)


def test_numbers_that_are_no_counts_may_be_large():
    check_counts(
        {"rope_theta": 10**9, "max_position_embeddings": 10**7, "eos_token_id": [10**6]}, Contents(9, 9, 9), "x"
    )
    check_counts({"max_window_layers": 28, "layer_types": ["full"] * 4}, Contents(9, 9, 9), "x")
    check_counts({"num_hidden_layers": True}, Contents(9, 9, 9), "x")


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 256},
        {"text_config": {"vocab_size_per_layer_input": 262_144}},
        {"label2id": {"bricklayer": 1400, "layers": 1401}},
        {"num_depth_bins": 10_000, "layer_scale": 5000},
    ],
)
def test_what_only_speaks_of_layers_counts_none(config):
    check_counts(config, Contents(9, 9, 9), "x")


@pytest.mark.parametrize(
    "config",
    [
        *({name: 10**6} for name in ("num_hidden_layers", "n_layer", "encoder_layers", "depth", "layers")),
        {"vision_config": {"depths": [2, 10**6]}},
        {"encoder": {"num_layers_per_stack": 10**6}},
    ],
)
def test_what_counts_layers_is_bounded_at_any_level(config):
    with pytest.raises(ValueError, match="at most 1,000 are read"):
        check_counts(config, Contents(9, 9, 9), "x")


def test_weights_that_cannot_be_counted_still_bound_the_lists(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    change(tmp_path, num_hidden_layers=10**9)
    refused(tmp_path, "says num_hidden_layers=1,000,000,000: at most")


@pytest.mark.parametrize("places,said", [({"": "disk"}, False), ({"model": "cpu", "lm_head": "disk"}, True)])
def test_what_was_asked_to_be_on_disk_is_no_news(folder, tmp_path, caplog, places, said):
    model = load_model(str(folder), device_map=places, offload_folder=str(tmp_path / "weights"))
    assert is_offloaded(model)
    assert ("meta device" in caplog.text) == said


def test_what_has_to_be_written_to_be_on_disk_is_in_a_folder_that_goes_with_the_model(tmp_path, monkeypatch, tiny):
    tiny("mixtral").save_pretrained(tmp_path / "mixtral")  # its experts are apart in the file, and fused in the model
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    model = load_model(str(tmp_path / "mixtral"), device_map={"": "disk"})
    assert is_offloaded(model) and any((tmp_path / "scratch").rglob("*experts*"))
    del model
    gc.collect()
    assert not any((tmp_path / "scratch").iterdir())
