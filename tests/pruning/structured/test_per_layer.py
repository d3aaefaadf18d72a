"""Layers of different widths: the class that a model becomes, its checkpoints, and what is refused by name."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_dsa import DSAConfig, DSAPruner, DSAStructuredConfig, prune_structures
from optimum_dsa.checkpoint import save
from optimum_dsa.checkpoint.load import load_model
from optimum_dsa.model.modeling_per_layer import class_named, rows_of
from optimum_dsa.pruning.structured.layout import LAYOUTS

from ...tiny import LOADS_COMPRESSED, same_state, state, tiny_llama, tokens
from .families import EVERY, FAMILIES, batch_of
from .test_layout import SEVERAL, counts_of, units_of


BOTH = ("ffn", "kv_group")


def smaller(share=0.3, structures=("ffn",), layout="per_layer", **changes):
    model = tiny_llama(**changes)
    report = prune_structures(model, tokens(), DSAStructuredConfig(share, structures, "magnitude", layout=layout))
    return model, report


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a model whose layers differ."""
    model, _ = smaller(num_hidden_layers=2)
    model.save_pretrained(tmp_path_factory.mktemp("per layer") / "model")
    return tmp_path_factory.getbasetemp() / "per layer0" / "model"


def test_a_model_becomes_one_whose_layers_may_differ_and_so_does_its_checkpoint(tmp_path):
    model, report = smaller(0.31, BOTH)
    assert type(model).__name__ == "PerLayerLlamaForCausalLM" and type(model) is class_named(type(model).__name__)
    widths = [layer.intermediate_size for layer in model.config.per_layer_config]
    assert widths == [report.kept[f"model.layers.{number}:ffn"] for number in range(3)]
    assert widths == [layer.mlp.down_proj.in_features for layer in model.model.layers]
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"modeling_per_layer.py", "model.safetensors"}
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(str(tmp_path))):
        assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))
    without_head = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(without_head(tokens())[0], model.model(tokens())[0])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).score.out_features == 2


def test_what_is_smaller_can_be_made_smaller_again(tmp_path):
    model, first = smaller(0.2, BOTH)
    second = prune_structures(model, tokens(), DSAStructuredConfig(0.2, BOTH, layout="per_layer"))
    assert second.parameters == first.parameters - first.removed and second.removed > 0
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    for layout in ("uniform", "padded"):
        with pytest.raises(ValueError, match="differ already, and a plain class has one width for all"):
            prune_structures(model, tokens(), DSAStructuredConfig(0.2, layout=layout))


@pytest.mark.parametrize("compressed", [False, *([True] if LOADS_COMPRESSED else [])])
def test_its_weights_can_be_pruned_and_stored_in_every_encoding(compressed, tmp_path):
    pruner = DSAPruner(smaller()[0])
    pruner.prune(tokens(), DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out", compressed=compressed)
    assert same_state(DSAPruner.from_pretrained(tmp_path / "out").model, state(pruner.model))


@pytest.mark.parametrize("family", SEVERAL)
def test_a_model_made_of_several_has_no_such_class(family):
    with pytest.raises(ValueError, match="it is made of several models.*use layout='padded'"):
        LAYOUTS["per_layer"](EVERY[family][0](), units_of(family), counts_of(family, "per_layer"))


def test_a_family_without_such_a_class_is_refused_before_work_and_padded_is_offered(tmp_path):
    model = FAMILIES["T5"][0]()
    before, batch = state(model), {name: value.repeat(4, 1) for name, value in batch_of("T5").items()}
    with pytest.raises(ValueError, match="T5ForCon.* \\(it is made of several models\\); use layout='padded'"):
        prune_structures(model, batch, DSAStructuredConfig(0.2, layout="per_layer"))
    assert same_state(model, before)

    class Own(type(tiny_llama())):
        pass

    model = tiny_llama()
    model.__class__ = Own
    with pytest.raises(ValueError, match="Own has no class .*its code is not transformers' own.*'padded'"):
        prune_structures(model, tokens(), DSAStructuredConfig(0.2, layout="per_layer"))


def test_padded_is_a_plain_model_with_zeros_for_what_went(tmp_path):
    """As much goes as where layers differ, and what a plain class cannot lack stays as zeros."""
    plain, report = smaller(0.31, layout="padded")
    _, other = smaller(0.31, layout="per_layer")
    assert type(plain) is type(tiny_llama()) and report.gone == other.gone and report.removed == other.removed
    widths = set(report.kept.values())
    assert plain.config.intermediate_size == max(widths) and len(widths) > 1
    assert report.padding == 96 * sum(max(widths) - kept for kept in report.kept.values()) > 0
    assert report.parameters - report.removed + report.padding == sum(p.numel() for p in plain.parameters())
    assert str(report).endswith(f"{report.padding:,} of them are zeros that stay") and "zeros" not in str(other)
    zeros = sum(int((layer.mlp.up_proj.weight == 0).all(1).sum()) for layer in plain.model.layers)
    assert zeros == report.padding // 96
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))


def test_experts_leave_no_zeros():
    units = {unit: each for unit, each in units_of("Mixtral").items() if each.kind == "expert"}
    counts = dict(zip(units, (1, 2)))
    with pytest.raises(ValueError, match="layers.1:expert comes to lose 2, .* use layout='uniform' or 'per_layer'"):
        LAYOUTS["padded"](FAMILIES["Mixtral"][0](), units, counts)


def changed(folder, target, **changes):
    """A copy of a checkpoint, its configuration changed."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return str(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"per_layer_config": {"0": {"intermediate_size": 9}}},
            "layers.0.mlp.down_proj.weight is .32, 24. in the checkpoint, .* it is .32, 9.",
        ),
        (
            {"per_layer_config": {"1": {"intermediate_size": 49}}},
            "Layer 1 has intermediate_size=49 .* at least 0, and",
        ),
        (
            {"per_layer_config": {"1": {"intermediate_size": -1}}},
            "Layer 1 has intermediate_size=-1 in per_layer_config",
        ),
        ({"per_layer_config": {"7": {"intermediate_size": 9}}}, "layer indices in the range .0, 2."),
        ({"per_layer_config": {"0": {"max_position_embeddings": 9}}}, "'max_position_embeddings', and per_layer_ten"),
        (
            {"per_layer_tensors": {"mlp.up_proj.weight": ["intermediate_size", 9, 0]}},
            "up_proj.weight is .48, 32., and",
        ),
        ({"per_layer_blocks": "model.blocks"}, "blocks"),
        ({"architectures": ["PerLayerMistralForCausalLM"]}, "'PerLayerMistralForCausalLM' .* one of both is wrong"),
        ({"architectures": ["os.system"]}, "'os.system' in architectures, and its model_type is 'dsa_llama'"),
        ({"model_type": "dsa_nothing"}, "dsa_nothing"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_name(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_model(changed(folder, tmp_path / "changed", **changes))


def test_whose_slopes_a_layer_has_is_in_its_configuration(tmp_path):
    model = FAMILIES["Bloom"][0]()
    for share in (0.05, 0.05):  # the second time, of what is left
        report = prune_structures(model, tokens(), DSAStructuredConfig(share, ("head",), "random", layout="per_layer"))
    kept = {number: rows_of(model.transformer.h[number])[1] for number in range(2)}
    assert [len(kept[number]) for number in kept] == list(report.kept.values()) and 1 < sum(
        map(len, kept.values())
    ) < 8
    model.save_pretrained(tmp_path / "out")
    loaded = load_model(str(tmp_path / "out"))
    assert {number: rows_of(loaded.transformer.h[number]) for number in kept} == {n: (4, kept[n]) for n in kept}
    assert torch.equal(logits(loaded), logits(model))
    for wrong, message in (({"0": [0]}, "names .0. of 4"), ({"0": [9] * len(kept[0])}, "names .9.*of 4")):
        with pytest.raises(ValueError, match=f"Layer 0 has {len(kept[0])} heads .* per_layer_heads {message}"):
            load_model(changed(tmp_path / "out", tmp_path / message[6:8], per_layer_heads=wrong))


@pytest.mark.parametrize("there", [False, True])
def test_a_kill_while_it_is_saved_leaves_the_old_folder_or_none(there, tmp_path, monkeypatch):
    pruner = DSAPruner(smaller()[0])
    pruner.prune(tokens(), DSAConfig(0.5, "magnitude", "uniform"))
    if there:
        pruner.save_pretrained(tmp_path / "out")
        before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        pruner.prune(tokens(), DSAConfig(0.6, "magnitude", "uniform"))
    child = os.fork()
    if not child:
        # weights, configuration and code are written by then
        monkeypatch.setattr(save, "write_description", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        pruner.save_pretrained(tmp_path / "out")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    if not there:
        assert not (tmp_path / "out").exists()
        return
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert type(load_model(str(tmp_path / "out"))).__name__ == "PerLayerLlamaForCausalLM"
