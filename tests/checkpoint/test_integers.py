"""Whole numbers in compressed-tensors' format: what transformers computes with them, and what stays as it is."""

import json
import subprocess
import sys

import pytest
import torch

from optimum_dsa import DSAConfig, DSAPruner, convert, quantize
from optimum_dsa.checkpoint.exports import export
from optimum_dsa.checkpoint.integers_format import FORMATS
from optimum_dsa.checkpoint.integers_shards import restore
from optimum_dsa.checkpoint.load import load_model

from ..test_commands import run
from ..tiny import tiny_llama, tokens


# No line of this package: what a user of transformers runs.
THEIRS = """
import sys
import torch
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        rounded = model(torch.arange(20)[None]).logits
        for module in model.modules():
            module.quantization_enabled = False  # of inputs; weights are what they are
        logits = model(torch.arange(20)[None]).logits
    zeros = {name: one == 0 for name, one in model.state_dict().items() if name.endswith("proj.weight")}
    torch.save((rounded.float(), logits.float(), zeros), folder + "/theirs.pt")
assert "optimum_dsa.checkpoint" not in sys.modules
"""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A Llama whose rows divide by 32, half of whose weights are zeros, in two shards; and its folder."""
    pruner = DSAPruner(tiny_llama(hidden_size=64, intermediate_size=96).bfloat16())
    pruner.prune(None, DSAConfig(0.5, method="magnitude", allocation="uniform"))
    folder = tmp_path_factory.mktemp("pruned") / "out"
    pruner.save_pretrained(folder, max_shard_size="150KB")
    return pruner.model, folder


def test_transformers_computes_what_we_say_it_does(pruned, tmp_path):
    pytest.importorskip("compressed_tensors")
    model, folder = pruned
    kinds = {
        tmp_path / "int4": ("pack-quantized", 4, 32, 0.15),
        tmp_path / "int8": ("pack-quantized", 8, 0, 0.02),
        tmp_path / "dense8": ("int-quantized", 8, 0, 0.02),
    }
    for place, (form, bits, group, _) in kinds.items():
        found = quantize(folder, place, bits, group, format=form)
        assert found.matrices == 21 and found.bytes < 0.7 * found.bytes_before
    arguments = [sys.executable, "-c", THEIRS, *map(str, kinds)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for place, (form, _, _, bound) in kinds.items():
        rounded, logits, zeros = torch.load(place / "theirs.pt")
        assert len(zeros) == 21
        for name, gone in zeros.items():
            assert torch.equal(gone, model.state_dict()[name] == 0)
        restore(place, tmp_path / "dense" / place.name)
        ours = load_model(str(tmp_path / "dense" / place.name), dtype=torch.bfloat16)
        with torch.no_grad():
            # Weights are bit for bit the same, and so is what is computed with them.
            assert torch.equal(ours(torch.arange(20)[None]).logits.float(), logits)
            dense = model(torch.arange(20)[None]).logits.float()
            if form == "int-quantized":
                round_inputs(ours)
            assert torch.equal(ours(torch.arange(20)[None]).logits.float(), rounded)
        # 0.058 and 0.005 were measured, of logits up to 0.58; 0.007 with inputs rounded, too
        assert (logits - dense).abs().max() < bound and (rounded - dense).abs().max() < bound


def round_inputs(model):
    """Round what matrices of blocks are multiplied with to 8 bits, as compressed-tensors does it: for every token."""
    parts = pytest.importorskip("compressed_tensors.quantization")
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.quantization_scheme = parts.QuantizationScheme(
                targets=["Linear"], input_activations=FORMATS["int-quantized"].inputs
            )
            module.quantization_status = parts.QuantizationStatus.COMPRESSED
            parts.lifecycle.forward.set_forward_quantized(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ours_loads_it_dense_and_the_types_stay(dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = tiny_llama(hidden_size=64, intermediate_size=96).to(dtype)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1e-3  # scales that float16 has few digits for
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    model.save_pretrained(tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out", 8, 32)
    restore(tmp_path / "out", tmp_path / "dense")
    loaded, dense = load_model(str(tmp_path / "out")), load_model(str(tmp_path / "dense"))
    for name, tensor in dense.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and tensor.dtype == dtype
        before = model.state_dict()[name]
        assert (tensor[before == 0] == 0).all()
        # Scales of 6e-7 are steps of float16 apart, by which the largest weight may be cut off.
        assert (tensor - before).abs().max() <= (0.06 if dtype == torch.float16 else 0.01) * before.abs().max()


@pytest.mark.parametrize(("values", "group", "asked"), [("int4", 32, 32), ("int8", 0, 32), ("int4", 64, 32)])
def test_what_lies_on_a_grid_stays_bit_for_bit(values, group, asked, tmp_path):
    pruner = DSAPruner(tiny_llama(hidden_size=64, intermediate_size=128).bfloat16())
    settings = {"name": values, "group": group}
    pruner.prune(tokens(), DSAConfig(0.5, method="wanda", allocation="uniform", values=settings))
    pruner.save_pretrained(tmp_path / "in", encoding="bitmask_whole")
    found = quantize(tmp_path / "in", tmp_path / "out", int(values[3:]), asked)
    assert found.as_they_were == found.matrices == 21
    restore(tmp_path / "out", tmp_path / "dense")
    held = load_model(str(tmp_path / "dense"), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in pruner.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--group", "32"], "21 matrices of 4 bits, a scale for 32 columns"),
        (["--format", "int-quantized"], "21 matrices of 8 bits, a scale for a row"),
    ],
)
def test_the_command_says_what_it_did_and_verify_counts(options, said, pruned, tmp_path, monkeypatch, capsys):
    folder = str(pruned[1])
    code, output, _ = run(monkeypatch, capsys, "quantize", folder, str(tmp_path / "out"), *options)
    assert code == 0 and said in output and ("rounds what they are multiplied with" in output) == (len(options[1]) > 2)
    assert "left as they are: 1, such as lm_head.weight" in output
    assert (tmp_path / "out" / "dsa_config.json").read_bytes() == (pruned[1] / "dsa_config.json").read_bytes()
    code, output, _ = run(monkeypatch, capsys, "verify", str(tmp_path / "out"))
    assert code == 0 and output.startswith("holds: 46,080 of 92,160 prunable weights are zero (0.5000)"), output


def test_what_cannot_be_quantised_is_said_by_name(pruned, tiny, tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=48, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    found = quantize(tmp_path / "tied", tmp_path / "out", 4, 64)
    assert found.kept["model.layers.0.mlp.down_proj.weight"].startswith("its rows of 48 do not divide by 64")
    assert found.kept["lm_head.weight"] == "it is the embedding, too" and found.matrices == 18
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj" in stated["ignore"] and "lm_head" in stated["ignore"]
    assert "3, such as model.layers.0.mlp.down_proj.weight" in str(found)
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="Nothing of .* can be quantised .*it is of a Conv1D"):
        quantize(tmp_path / "gpt2", tmp_path / "none", 4, 32)
    for settings, message in (
        ({"bits": 3}, "4 or 8 bits in pack-quantized, got 3"),
        ({"bits": 4, "format": "int-quantized"}, "8 bits in int-quantized, got 4"),
        ({"group": 32, "format": "int-quantized"}, "in int-quantized; use 0, where 0 is all of a row"),
        ({"group": 33}, "group=33 is no number of columns"),
        ({"scales": "best"}, "mse, got 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(tmp_path / "tied", tmp_path / "none", **settings)
    with pytest.raises(KeyError, match="Unknown format 'int-quantised'. Did you mean 'int-quantized'"):
        quantize(tmp_path / "tied", tmp_path / "none", format="int-quantised")
    with pytest.raises(ValueError, match="is quantised .compressed-tensors"):
        quantize(tmp_path / "out", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="No folder"):
        quantize(tmp_path / "nothing", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_it_writes_is_no_source_for_other_forms_and_never_replaces_its_own_source(pruned, tmp_path):
    quantize(pruned[1], tmp_path / "int4", 4, 32)
    for write, arguments in ((convert, ("out", "dense")), (export, ("out.gguf", "gguf", "q4_0"))):
        with pytest.raises(ValueError, match="int4 is quantised .* Convert the one that it was made from"):
            write(tmp_path / "int4", tmp_path / arguments[0], *arguments[1:])
    with pytest.raises(ValueError, match="what they were would be lost; name another folder"):
        quantize(pruned[1], pruned[1], 4, 32)


def test_what_was_never_pruned_is_not_sent_to_verify(monkeypatch, capsys, tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "dense")
    code, output, _ = run(
        monkeypatch, capsys, "quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--group", "32"
    )
    assert code == 0 and "next: optimum-cli dsa evaluate" in output
