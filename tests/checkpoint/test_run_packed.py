"""Compressed checkpoints that run packed: loaded straight into packed layers, read, saved, refused when damaged."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, DSAQuantizationConfig, prune
from optimum_dsa.checkpoint.convert import convert
from optimum_dsa.checkpoint.encodings import ENCODINGS
from optimum_dsa.checkpoint.shards import find_shards, packed_headers
from optimum_dsa.packed.pack_model import packed_layers, unpack_model

from ..conftest import FAMILIES
from ..tiny import needs_compressed_loading, same_state, state, tiny_llama, tokens


pytestmark = [pytest.mark.contract, needs_compressed_loading]
PACKED = DSAQuantizationConfig(run_packed=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pruned bfloat16 Llama, and folders with it: dense, compressed in several shards, and packed."""
    folder = tmp_path_factory.mktemp("packed")
    pruner = DSAPruner(tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).bfloat16())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(folder / "dense")
    pruner.save_pretrained(folder / "compressed", compressed=True, max_shard_size="60KB")
    convert(folder / "dense", folder / "packed", "packed")
    return pruner.model, folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bart", "bert", "mixtral", "qwen3_next", "falcon_new"])
def test_every_family_is_loaded_packed_bit_for_bit(family, tiny, tmp_path):
    model = tiny(family)
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform", skip_unprunable=True))
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", "packed")
    loader = getattr(transformers, FAMILIES[family].auto)
    loaded, found = loader.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(found.values())
    assert packed_layers(loaded) or family.startswith("falcon")  # whose layers are of a class of their own
    unpack_model(loaded)
    assert same_state(loaded, state(model))


@pytest.mark.parametrize("stored", ["compressed", "packed"])
def test_it_is_loaded_packed_where_a_caller_or_the_checkpoint_says_so(folders, stored):
    model, folder = folders
    asked = {"quantization_config": PACKED} if stored == "compressed" else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder / stored, **asked)
    layer = loaded.model.layers[0].mlp.down_proj
    assert len(packed_layers(loaded)) == 21 and loaded.is_quantized and loaded.config.quantization_config.run_packed
    # the bytes of the file themselves: nothing was made dense, and nothing copied
    assert layer.mask.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()
    ids = tokens(2)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=2e-2, atol=2e-2)
    generated = [each.generate(ids[:1, :5], max_new_tokens=6, do_sample=False) for each in (loaded, model)]
    assert torch.equal(*generated)
    assert not packed_layers(loaded.dequantize()) and same_state(loaded, state(model))
    assert not loaded.is_quantized and not hasattr(loaded, "hf_quantizer")


def test_without_being_asked_for_it_is_dense_as_always(folders):
    model, folder = folders
    for name, asked in (("compressed", {}), ("packed", {"quantization_config": DSAQuantizationConfig()})):
        loaded = AutoModelForCausalLM.from_pretrained(folder / name, **asked)
        assert not packed_layers(loaded) and same_state(loaded, state(model)) and not loaded.is_quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "auto"])
def test_the_type_that_is_asked_for(folders, dtype):
    loaded, plain = (
        AutoModelForCausalLM.from_pretrained(folders[1] / name, dtype=dtype) for name in ("packed", "dense")
    )
    assert loaded.dtype == plain.dtype == loaded.model.layers[1].mlp.up_proj.values.dtype
    unpack_model(loaded)
    assert same_state(loaded, state(plain))


def test_types_that_a_model_keeps_in_float32_stay_so(tiny, tmp_path):
    model = tiny("t5")
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform"))
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", "packed")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "packed", dtype=torch.float16)
    block = loaded.encoder.block[0].layer
    assert block[1].DenseReluDense.wo.values.dtype == torch.float32
    assert block[0].SelfAttention.q.values.dtype == torch.float16
    assert loaded(input_ids=tokens(1), decoder_input_ids=tokens(1)).logits.isfinite().all()


def test_device_maps(folders):
    for places in ({"": "cpu"}, "auto"):
        loaded = AutoModelForCausalLM.from_pretrained(folders[1] / "packed", device_map=places)
        ids = tokens(2).to(loaded.device)
        torch.testing.assert_close(loaded(ids).logits.cpu(), folders[0](tokens(2)).logits, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="not kept on a disk"):
        AutoModelForCausalLM.from_pretrained(folders[1] / "packed", device_map={"": "disk"})


def test_what_reads_and_saves_a_model_does_so_with_a_packed_one(folders, tmp_path):
    model, folder = folders
    pruner = DSAPruner.from_pretrained(folder / "packed")
    plain = DSAPruner.from_pretrained(folder / "dense")
    assert packed_layers(pruner.model) and pruner.verify() == plain.verify() and pruner.verify().holds
    masks = dict(plain.masks())
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks())
    measured = pruner.measure(tokens(2))
    assert measured.size == plain.verify().prunable
    assert round(measured.sparsity * measured.size) == plain.verify().removed
    pruner.save_pretrained(tmp_path / "again")
    assert packed_layers(pruner.model) and pruner.model.is_quantized
    for path in (folder / "packed").iterdir():
        if path.suffix == ".safetensors" or path.name == "config.json":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    pruner.save_pretrained(tmp_path / "dense", encoding="dense")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (folder / "dense" / name).read_bytes()


def test_transformers_own_saving_is_refused_by_name(folders, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folders[1] / "packed")
    pruner = DSAPruner(tiny_llama())
    assert pruner.pack(0.0).packed
    for model in (loaded, pruner.model):
        with pytest.raises(ValueError, match="is packed, which transformers' own save_pretrained cannot write"):
            model.save_pretrained(tmp_path)


def test_conversions(folders, tmp_path):
    folder = folders[1]
    for source, to in (("compressed", "packed"), ("packed", "compressed"), ("packed", "dense")):
        convert(folder / source, tmp_path / to / source, to)
        stated = json.loads((tmp_path / to / source / "config.json").read_text()).get("quantization_config") or {}
        assert stated.get("run_packed", False) == (to == "packed")
        assert find_shards(tmp_path / to / source).encoding is ENCODINGS["dense" if to == "dense" else "bitmask"]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / to / source)
        unpack_model(loaded)
        assert same_state(loaded, state(folders[0]))
    for to in ("packed", "compressed"):
        with pytest.raises(ValueError, match=f"is {to} already"):
            convert(folder / to, tmp_path / "none", to)


def damaged(folder, target, change):
    shutil.copytree(folder, target)
    (shard,) = target.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    header = next(iter(packed_headers(shard).values()))
    change(data, data.index(b"DSAMASK1"), header)
    shard.write_bytes(data)
    return target


def flip(data, start, header):
    data[start + header.mask.start] ^= 1


def promise(data, start, header):
    data[start + 8 * 4 : start + 8 * 5] = (2**40).to_bytes(8, "little")


@pytest.mark.parametrize("change", [flip, promise])
def test_damage_is_refused(folders, tmp_path, change):
    bad = damaged(folders[1] / "packed", tmp_path / "bad", change)
    with pytest.raises(ValueError, match="does not fit|damaged"):
        AutoModelForCausalLM.from_pretrained(bad)


def test_what_cannot_be_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="run_packed is for compressed checkpoints"):
        AutoModelForCausalLM.from_pretrained(folders[1] / "dense", quantization_config=PACKED)
    with pytest.raises(ValueError, match="run_packed is true or false"):
        DSAQuantizationConfig(run_packed="yes")


def test_too_few_zeros_are_a_dense_model(tmp_path, caplog):
    model = tiny_llama().bfloat16()
    prune(model, None, DSAConfig(0.1, "magnitude", "uniform"))
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "packed", "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not packed_layers(loaded) and not loaded.is_quantized and "the model is dense" in caplog.text
    assert same_state(loaded, state(model))


MEASURE = """
    import sys, threading, time
    import torch, optimum_dsa
    from transformers import AutoModelForCausalLM
    from optimum_dsa.packed.pack_model import packed_layers

    def resident(kind):
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])

    def run(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
        return model

    def watch():
        while not done:
            for kind in peaks:
                peaks[kind] = max(peaks[kind], resident(kind))
            time.sleep(0.01)

    run(sys.argv[1])  # what is imported and made once
    before = {kind: resident(kind) for kind in ("RssAnon", "VmRSS")}
    peaks, done = dict(before), False
    thread = threading.Thread(target=watch)
    thread.start()
    model = run(sys.argv[2])
    done = True
    thread.join()
    print(len(packed_layers(model)), *(peaks[kind] - before[kind] for kind in peaks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_packed_matrices(folders, tmp_path):
    """Of a process that loads about 100 MB of bfloat16 weights, of which 60 % are zero, and runs them."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_key_value_heads": 4}
    with torch.device("meta"):
        model = tiny_llama(**sizes, num_attention_heads=4).bfloat16()
    made, generator = {}, torch.Generator().manual_seed(0)
    for shape in {parameter.shape for parameter in model.parameters()}:
        made[shape] = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        if min(shape) > 97:
            made[shape] *= torch.rand(shape, generator=generator) > 0.6
            made[shape] += 0.0  # -0.0 is a value
    weights = {name: made[parameter.shape].clone() for name, parameter in model.state_dict().items()}
    model.config.dtype, model.config.architectures = "bfloat16", ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "dense")
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    dense, packed = convert(tmp_path / "dense", tmp_path / "packed", "packed")
    arguments = [sys.executable, "-c", textwrap.dedent(MEASURE), str(folders[1] / "packed"), str(tmp_path / "packed")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    layers, anonymous, resident = map(int, done.stdout.split())
    assert layers == 6 * 7 and dense > 100e6 and packed < 0.5 * dense
    assert anonymous <= 1.1 * packed + 2 * 768 * 3072  # the last is the largest matrix with its zeros
    assert resident <= 0.75 * dense
