"""Files for other programs: what a GGUF holds, and what llama.cpp makes of it."""

import copy
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from optimum_dsa import demo_model, demo_texts, find_architecture
from optimum_dsa.checkpoint.exports import EXPORTS, export
from optimum_dsa.pruning.structured.layout import LAYOUTS
from optimum_dsa.pruning.structured.structures import find_structures
from optimum_dsa.pruning.structured.wholes.entire import find_entire

from ..test_commands import run
from ..tiny import tiny_llama
from .engine import deviation, served


@pytest.fixture(scope="module")
def models():
    """The embedded model, and one cut out of it whose layers differ in heads and channels."""
    plain = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    model = copy.deepcopy(plain)
    found = find_structures(model, find_architecture(model), {"input_ids": torch.arange(16)[None]}).structures
    gone = {"kv_group": [0, 2, 1, 0, 3], "ffn": [8, 0, 100, 40, 16]}
    counts = {unit: gone[each.kind][number // 2 % 5] for number, (unit, each) in enumerate(found.items())}
    layout = LAYOUTS["per_layer"](model, found, counts)
    for unit, each in found.items():
        layout.take(model, each, torch.arange(counts[unit]))
    layout.settle(model)
    short = copy.deepcopy(plain)
    # Of one block the attention, of another the MLP, of a third both, and of the last the MLP go.
    units = find_entire(short, find_architecture(short), {"input_ids": torch.arange(16)[None]}).structures
    last = len(plain.model.layers) - 1
    gone = {"1:kv_group", "2:ffn", "3:kv_group", "3:ffn", f"{last}:ffn"}
    counts = {unit: len(each) * (unit.rpartition(".")[2] in gone) for unit, each in units.items()}
    layout = LAYOUTS["per_layer"](short, units, counts)
    for unit, each in units.items():
        layout.take(short, each, torch.arange(counts[unit]))
    layout.settle(short)
    return {"plain": plain, "per_layer": model, "absent": short}


def saved(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(folder)
    return folder


@pytest.fixture(params=["plain", "per_layer", "absent"])
def folder(request, models, tmp_path):
    return models[request.param], saved(models[request.param], tmp_path / request.param)


def test_weights_of_another_configuration_are_refused(folder, tmp_path):
    pytest.importorskip("gguf")
    file = folder[1] / "config.json"
    said = json.loads(file.read_text())
    (next(iter(said.get("per_layer_config", {"": said}).values())))["intermediate_size"] = 7
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="and by its config.json it is .*7.*: they do not belong together"):
        export(folder[1], tmp_path / "out.gguf", "gguf")
    assert not list(tmp_path.glob("*gguf*"))


@pytest.mark.parametrize("kind", EXPORTS["gguf"].kinds)
def test_a_gguf_holds_the_model(folder, kind, tmp_path, monkeypatch, capsys):
    gguf = pytest.importorskip("gguf")
    model, source = folder
    path = tmp_path / "out.gguf"
    code, output, _ = run(monkeypatch, capsys, "convert", str(source), str(path), "--to", "gguf", "--type", kind)
    assert code == 0 and f"{path.stat().st_size:,} bytes" in output
    assert [file.name for file in tmp_path.glob("*gguf*")] == ["out.gguf"]
    reader = gguf.GGUFReader(path)

    def said(name):
        return reader.get_field(name).contents()

    differ = source.name != "plain"
    arch, layers = "deci" if differ else "llama", model.config.per_layer_config
    assert said("general.architecture") == arch
    for name, setting in (
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
    ):
        # A layer without an MLP has one channel of zeros.
        numbers = [max(getattr(layer, setting), setting == "intermediate_size") for layer in layers]
        assert said(f"{arch}.{name}") == (numbers if differ else numbers[0]) and (len(set(numbers)) > 1) == differ
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert said("tokenizer.ggml.tokens") == tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
    assert said("tokenizer.ggml.pre") == "gpt-2" and said("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    tensors = {
        one.name: torch.tensor(gguf.dequantize(one.data, one.tensor_type)).view(*reversed(one.shape.tolist()))
        for one in reader.tensors
    }
    own = {id(parameter): parameter for parameter in model.parameters()}
    missing = sum(5 for layer in layers if not layer.num_attention_heads)  # four matrices and their norm
    assert len(tensors) == len(own) - missing and bool(missing) == (source.name == "absent")
    # Of 8 bits half a step, of 4 a whole one (the largest is -8, and 8 is none); steps are float16.
    error = {"f32": 0, "f16": 5e-4, "q8_0": 0.6 / 127, "q4_0": 1 / 8}[kind]

    def same(written, weight):
        assert (written - weight).abs().max() <= error * 1.01 * weight.abs().max()
        assert (written[weight == 0] == 0).all()

    for number, layer in enumerate(model.model.layers):
        written, weight = tensors[f"blk.{number}.ffn_down.weight"], layer.mlp.down_proj.weight
        if not weight.numel():
            assert written.shape == (len(weight), 1) and not written.any()
        else:
            same(written, weight)
        if not layer.self_attn.q_proj.weight.numel():
            continue
        same(tensors[f"blk.{number}.attn_v.weight"], layer.self_attn.v_proj.weight)
        # Halves of a head that turn together stand beside each other: row 1 is the head's ninth of 16.
        queries = tensors[f"blk.{number}.attn_q.weight"], layer.self_attn.q_proj.weight
        same(queries[0][1], queries[1][8])
        same(queries[0][-1], queries[1][-1])


def test_transformers_reads_a_plain_one_back(models, tmp_path):
    pytest.importorskip("gguf")
    export(saved(models["plain"], tmp_path / "model"), tmp_path / "out.gguf", "gguf", "f32")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32).eval()
    given = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(given).logits, models["plain"](given).logits)


@pytest.mark.parametrize(("kind", "bound"), [("f16", 0.01), ("q8_0", 0.3)])
def test_the_real_engine_says_what_the_model_says(folder, kind, bound, tmp_path):
    pytest.importorskip("xllamacpp")
    model, source = folder
    export(source, tmp_path / "out.gguf", "gguf", kind)
    tokenizer = AutoTokenizer.from_pretrained(source)
    given = tokenizer(demo_texts("validation")[0][:200]).input_ids
    # 0.003 and, of what 8 bits a weight change, 0.13 were measured
    worst, behind = deviation(served(tmp_path / "out.gguf"), model, given)
    assert worst < bound and behind == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "opt"}, "is a opt; written as GGUF here are llama, mistral, .*, gpt2, .*convert_hf_to_gguf"),
        ({"attention_bias": True}, "has attention_bias=True, which is not written as GGUF here"),
        ({"hidden_act": "gelu"}, "has hidden_act='gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "turns positions by 'linear'",
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_and_leaves_no_file(changes, message, tmp_path):
    pytest.importorskip("gguf")
    folder = saved(tiny_llama(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "out.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_asked_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    for target, kind, message in (
        (folder, None, "is a folder; name a file"),
        (tmp_path / "no" / "out.gguf", None, "is in no folder"),
        (tmp_path / "out.gguf", "q4_k", "f16 or f32 or q8_0 or q4_0, got 'q4_k'"),
        (tmp_path / "out", None, "known as gguf by its ending; name .*out.gguf"),
    ):
        with pytest.raises(ValueError, match=message):
            export(folder, target, "gguf", kind)
    (tmp_path / "thesis.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.gguf is no gguf file, and would be replaced"):
        export(folder, tmp_path / "thesis.gguf", "gguf")
    assert (tmp_path / "thesis.gguf").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="No folder"):
        export(tmp_path / "nothing", tmp_path / "out.gguf", "gguf")
    code, _, errors = run(monkeypatch, capsys, "convert", str(folder), "out", "--to", "compressed", "--type", "f16")
    assert code and "--type is of --to gguf" in errors
    if "gguf" in sys.modules:
        with pytest.raises(ValueError, match="has no tokenizer.json, and a GGUF holds its tokenizer"):
            export(folder, tmp_path / "out.gguf", "gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="package gguf, which is not installed: .*gguf"):
        export(folder, tmp_path / "out.gguf", "gguf")


def test_a_tokenizer_that_has_no_name_there_is_refused(tmp_path):
    pytest.importorskip("gguf")
    folder = saved(tiny_llama(), tmp_path / "model")
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match="as GPT-2's, .* it is a BPE after Whitespace"):
        export(folder, tmp_path / "out.gguf", "gguf")
