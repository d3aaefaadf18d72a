"""Models in other forms are made dense while they are loaded, or refused by name before."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_dsa import DSAConfig, DSAPruner, plan
from optimum_dsa.checkpoint.description import read_description
from optimum_dsa.checkpoint.forms import check_unpacked, located
from optimum_dsa.sharing.provenance import command

from ..conftest import decoder
from ..test_commands import run
from ..tiny import same_state, state, tiny_llama, tokens
from ..tiny_gguf import write_gguf


needs_gguf = pytest.mark.skipif(
    not hasattr(transformers, "GgufConfig"), reason="this transformers has another way to read a GGUF"
)
BLOCK = 16


@pytest.fixture
def gguf(tmp_path):
    """A folder with two GGUFs, a licence, and a photo of nobody's business."""
    pytest.importorskip("gguf")
    folder = tmp_path / "models"
    folder.mkdir()
    write_gguf(folder / "tiny-q8.gguf", 64, "Q8_0")
    write_gguf(folder / "tiny-f32.gguf", 64)
    (folder / "LICENSE").write_text("x")
    return folder


def pruned(source, **options):
    pruner = DSAPruner.from_pretrained(source, **options)
    pruner.prune(tokens(), DSAConfig(0.5, "wanda", "uniform"))
    return pruner


@needs_gguf
def test_a_gguf_is_made_dense_and_said(gguf, tmp_path, caplog):
    pruner = pruned(gguf / "tiny-q8.gguf")
    assert "tiny-q8.gguf: its weights are GGUF Q8_0, made dense." in caplog.text
    assert type(pruner.model) is transformers.LlamaForCausalLM
    assert type(pruner.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(pruner.model.config, "quantization_config")
    pruner.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "dsa_config.json", "dsa_manifest.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    described = read_description(tmp_path / "out")
    assert described["base_model"] == {
        "name": "tiny-q8.gguf", "revision": None, "gguf_file": "tiny-q8.gguf", "form": "GGUF Q8_0, made dense",
    }  # fmt: skip
    assert "prune tiny-q8.gguf -o OUT" in command(described) and "--gguf-file" not in command(described)
    again = DSAPruner.from_pretrained(tmp_path / "out")
    assert again.verify().holds and same_state(again.model, state(pruner.model))
    assert again.tokenizer("ab").input_ids == pruner.tokenizer("ab").input_ids


@needs_gguf
def test_its_weights_are_those_of_the_file(gguf):
    exact, near = (DSAPruner.from_pretrained(gguf, gguf_file=f"tiny-{kind}.gguf").model for kind in ("f32", "q8"))
    tensors = write_gguf(gguf / "again.gguf", 64)
    for number, layers in enumerate(zip(exact.model.layers, near.model.layers, strict=True)):
        right = torch.from_numpy(tensors[f"blk.{number}.ffn_down"])
        assert torch.equal(layers[0].mlp.down_proj.weight, right)
        difference = (layers[1].mlp.down_proj.weight - right).abs().max()
        assert 0 < difference < 0.02


@needs_gguf
def test_of_several_in_a_folder_one_is_named(gguf, tmp_path, monkeypatch, capsys):
    arguments = ["prune", str(gguf), "--gguf-file", "tiny-q8.gguf", "-o", str(tmp_path / "out"), "-s", "0.5"]
    code, output, errors = run(monkeypatch, capsys, *arguments, "--method", "magnitude", "--allocation", "uniform")
    assert code == 0, errors
    described = read_description(tmp_path / "out")
    assert described["base_model"]["gguf_file"] == "tiny-q8.gguf"
    assert described["base_files"]["kept"] == ["LICENSE"]
    assert described["base_files"]["left"] == {"tiny-f32.gguf": "weights in another form"}
    assert plan(gguf / "tiny-q8.gguf", DSAConfig(0.5), run_block=False).line


@needs_gguf
def test_the_tokenizer_beside_it_is_the_models_own(gguf):
    tokenizer = DSAPruner.from_pretrained(gguf / "tiny-q8.gguf").tokenizer
    tokenizer.add_tokens(["beside"])
    tokenizer.save_pretrained(gguf)
    assert "beside" in DSAPruner.from_pretrained(gguf / "tiny-q8.gguf").tokenizer.get_vocab()


def test_what_a_path_means(tmp_path):
    (tmp_path / "a.gguf").write_text("x")
    (tmp_path / "a.bin").write_text("x")
    assert located(str(tmp_path / "a.gguf"), {}) == (str(tmp_path), {"gguf_file": "a.gguf"})
    assert located("user/name/deep/q4.gguf", {"revision": "x"}) == (
        "user/name", {"revision": "x", "gguf_file": "deep/q4.gguf"},
    )  # fmt: skip
    assert located("user/name", {}) == ("user/name", {})
    with pytest.raises(ValueError, match="is a file; a model is a folder, a .gguf or a Hub id"):
        located(str(tmp_path / "a.bin"), {})
    with pytest.raises(ValueError, match="names a GGUF, and gguf_file='b.gguf' another"):
        located(str(tmp_path / "a.gguf"), {"gguf_file": "b.gguf"})
    with pytest.raises(FileNotFoundError, match="No file"):
        located(str(tmp_path / "none.gguf"), {})


def test_a_gguf_is_found_by_its_ending_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json, and the GGUF .*; name it with gguf_file"):
        DSAPruner.from_pretrained(str(only_gguf(tmp_path / "a", "m.gguf").parent))
    with pytest.raises(ValueError, match="ends in .GGUF, and transformers takes what ends in .gguf"):
        DSAPruner.from_pretrained(str(only_gguf(tmp_path / "b", "m.GGUF")))


def test_a_gguf_that_is_not_there_is_not_made_dense(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="has no x.gguf"):
        DSAPruner.from_pretrained(str(tmp_path), gguf_file="x.gguf")
    assert "made dense" not in caplog.text


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_gguf_that_ends_too_soon_is_named_in_one_line(tmp_path, share):
    file = only_gguf(tmp_path / "a", "short.gguf")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(ValueError, match="short.gguf .*cannot be read"):
        DSAPruner.from_pretrained(str(file))


def only_gguf(folder, name):
    """A GGUF with nothing beside it."""
    folder.mkdir()
    write_gguf(folder / name)
    return folder / name


@pytest.mark.parametrize("inside", ["0_Transformer", "checkpoint-10"])
def test_a_model_in_a_folder_of_the_folder_is_named(tmp_path, inside):
    tiny_llama().save_pretrained(tmp_path / inside)
    with pytest.raises(FileNotFoundError, match=f"no config.json, and .*{inside} holds a model"):
        DSAPruner.from_pretrained(str(tmp_path))


def test_a_gguf_that_is_none_ends_in_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises((ValueError, OSError)) as error:
        DSAPruner.from_pretrained(tmp_path / "a.gguf")
    assert len(str(error.value)) < 800


# -- quantised checkpoints


def quantised(folder, section, tensors=None):
    """Give the checkpoint in `folder` a quantization_config, and other tensors."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def fp8(folder):
    """A tiny Llama in 8 bits, as FineGrainedFP8 stores it: a scale for each square of weights."""
    tiny_llama().save_pretrained(folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "layers" in name and weight.ndim == 2:
            rows, columns = weight.shape
            squares = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scale = squares.abs().amax((1, 3)) / 448
            tensors[name] = (squares / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = weight
    section = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return quantised(folder, {**section, "modules_to_not_convert": ["lm_head"]}, tensors)


def mxfp4(folder):
    """A tiny GPT-OSS with experts in 4 bits: blocks of 32 numbers, with an exponent each."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "intermediate_size": 2 * 32}
    decoder("GptOss", **sizes).make().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj")) and "experts" in name]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 124, dtype=torch.uint8)
    return quantised(folder, {"quant_method": "mxfp4"}, tensors)


def test_eight_bits_are_made_dense_and_said(tmp_path, caplog):
    base, dense = fp8(tmp_path / "base"), state(tiny_llama())
    (base / "quantize_config.json").write_text("{}")
    pruner = DSAPruner.from_pretrained(base)
    assert "its weights are fp8, made dense." in caplog.text
    for name, value in pruner.model.state_dict().items():
        torch.testing.assert_close(value, dense[name], rtol=0.07, atol=1e-3)
    pruner.prune(tokens(), DSAConfig(0.5, "wanda", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    described = read_description(tmp_path / "out")
    assert described["base_model"]["form"] == "fp8, made dense"
    assert described["base_files"]["left"] == {"quantize_config.json": "of weights that were quantised"}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(plain, state(pruner.model))


def test_a_model_with_packed_weights_in_memory_is_refused(tmp_path):
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match="LlamaForCausalLM holds weights that are quantised with fp8; load it with"):
        DSAPruner(model).prune(None, DSAConfig(0.5, "magnitude", "uniform"))


SECTIONS = {
    "gptq (4 bits)": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq (4 bits)": {"quant_method": "awq", "bits": 4, "version": "gemm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "hqq": {"quant_method": "hqq", "quant_config": {}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "a_method_of_tomorrow": {"quant_method": "a_method_of_tomorrow"},
}


@pytest.mark.parametrize("named", SECTIONS)
@pytest.mark.parametrize("verb", ["prune", "recover", "search"])
def test_packed_weights_are_refused_by_name_before_work(tmp_path, named, verb, monkeypatch, capsys, text):
    tiny_llama().save_pretrained(tmp_path / "base")
    quantised(tmp_path / "base", SECTIONS[named])
    monkeypatch.setattr("optimum_dsa.pruner.open_checkpoint", lambda *args, **kwargs: pytest.fail("it was loaded"))
    sparsity = [] if verb == "recover" else ["-s", "0.5"]
    arguments = [verb, str(tmp_path / "base"), "-o", str(tmp_path / "out"), "--dataset", text, *sparsity]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and len(errors.strip().splitlines()) == 1
    assert f"is quantised with {named}, and transformers cannot make" in errors
    assert not (tmp_path / "out").exists()


def test_a_section_of_the_text_part_is_found():
    with pytest.raises(ValueError, match="quantised with gptq"):
        check_unpacked({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "x")
    check_unpacked({"quantization_config": {"quant_method": "optimum-dsa"}}, "x")
    check_unpacked({"quantization_config": None}, "x")
    check_unpacked([], "x")


def test_experts_in_four_bits_are_made_dense(tmp_path):
    pruner = DSAPruner.from_pretrained(mxfp4(tmp_path / "base"), dtype=torch.float32)
    experts = pruner.model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.is_floating_point() and experts.gate_up_proj.abs().max() > 0
    pruner.prune(tokens(), DSAConfig(0.5, "wanda", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    assert read_description(tmp_path / "out")["base_model"]["form"] == "mxfp4, made dense"
    again = DSAPruner.from_pretrained(tmp_path / "out")
    assert again.verify().holds and same_state(again.model, state(pruner.model))
