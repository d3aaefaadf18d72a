"""Compressed checkpoints and transformers: loading, training, saving, with and without this package."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_dsa import DSAConfig, DSAPruner, prune
from optimum_dsa.checkpoint.convert import MARK, convert
from optimum_dsa.checkpoint.encodings import DENSE
from optimum_dsa.checkpoint.shards import find_shards, packed_headers
from optimum_dsa.common.installation import how_to_install

from ..conftest import FAMILIES
from ..tiny import needs_compressed_loading, same_state, state, tiny_llama, tokens


pytestmark = [pytest.mark.contract, needs_compressed_loading]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A pruned bfloat16 Llama, and folders with it: dense and compressed in several shards."""
    folder = tmp_path_factory.mktemp("compressed")
    pruner = DSAPruner(tiny_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).bfloat16())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(folder / "dense")
    pruner.save_pretrained(folder / "compressed", compressed=True, max_shard_size="60KB")
    assert len(find_shards(folder / "compressed").files) > 2
    return pruner.model, folder / "compressed", folder / "dense"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_loads_bit_for_bit_and_saves_under_its_own_names(family, tiny, tmp_path):
    model = tiny(family)
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform", skip_unprunable=True))
    model.save_pretrained(tmp_path / "dense")
    before, after = convert(tmp_path / "dense", tmp_path / "compressed", "compressed")
    assert after < before
    loader = getattr(transformers, FAMILIES[family].auto)
    loaded, found = loader.from_pretrained(tmp_path / "compressed", output_loading_info=True)
    assert not any(found.values()) and same_state(loaded, state(model))
    loaded.save_pretrained(tmp_path / "again")
    loader.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert same_state(loader.from_pretrained(tmp_path / "again"), state(model))


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "order",
    [
        "optimum_dsa, transformers",
        "transformers.modeling_utils, optimum_dsa",
        "optimum_dsa.checkpoint.transformers_loader",
    ],
)
def test_a_fresh_process_loads_it_after_an_import(compressed, order):
    code = f"""
        import sys
        import {order}
        from transformers import AutoModelForCausalLM
        loaded, dense = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in sys.argv[1:])
        print(all(value.equal(dense[name]) for name, value in loaded.items()), len(loaded))
    """
    done = python(code, *compressed[1:])
    assert done.stdout.split() == ["True", str(len(compressed[0].state_dict()))], done.stderr
    assert "failed" not in done.stderr


def test_without_the_import_the_error_says_what_to_install(compressed):
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = python(code, compressed[1])
    assert done.returncode == 1 and "optimum_dsa" not in done.stdout
    assert how_to_install() in done.stderr.strip().splitlines()[-1]


EARLIER = (
    "<these weights are compressed by optimum-dsa: install it with `pip install optimum-dsa` and `import optimum_dsa` "
    "before loading, or ask for a dense copy made with `optimum-cli dsa convert`>"
)


@pytest.mark.parametrize("mark", [EARLIER, None])
def test_what_is_written_for_those_without_the_package_does_not_matter_to_those_with_it(compressed, tmp_path, mark):
    """Version 0.1.0 wrote another text into `config.json`, and somebody may take it out."""
    convert(compressed[2], tmp_path / "out", "compressed")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert how_to_install() in config.pop(MARK)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | ({MARK: mark} if mark else {})))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(loaded, state(compressed[0]))


def test_packed_tensors_under_a_plain_name_are_refused_too(compressed, tmp_path):
    """Even where somebody renames the files and takes the mark out, nothing is initialised at random."""
    convert(compressed[2], tmp_path / "in", "compressed")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    del config["quantization_config"], config["transformers_weights"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    (tmp_path / "in" / "dsa_model-00001-of-00001.safetensors").rename(tmp_path / "in" / "model.safetensors")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "in")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "auto"])
def test_dtype(compressed, dtype):
    loaded, plain = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in compressed[1:])
    assert loaded.dtype == plain.dtype and same_state(loaded, state(plain))
    assert loaded.config.to_diff_dict() == plain.config.to_diff_dict()


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu"},
        "auto",
        {"": "disk"},
        {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"},
    ],
    ids=["cpu", "auto", "disk", "mixed"],
)  # fmt: skip
def test_device_maps(compressed, device_map, tmp_path):
    loaded, plain = (
        AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / str(number)))
        for number, folder in enumerate(compressed[1:])
    )
    inputs = tokens(2)
    if loaded.device.type != "meta":  # where all weights are offloaded, accelerate moves the inputs
        inputs = inputs.to(loaded.device)
    with torch.no_grad():
        assert torch.equal(loaded(inputs).logits, plain(inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_without_memory_maps(compressed, dtype):
    loaded, plain = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, disable_mmap=True) for folder in compressed[1:]
    )
    assert loaded.dtype == plain.dtype and same_state(loaded, state(plain))


def test_a_subfolder(compressed, tmp_path):
    shutil.copytree(compressed[1], tmp_path / "repository" / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "repository", subfolder="small")
    assert same_state(loaded, state(AutoModelForCausalLM.from_pretrained(compressed[2])))
    index = tmp_path / "repository" / "small" / "dsa_model.safetensors.index.json"
    for place in ("../other.safetensors", str(tmp_path / "other.safetensors")):
        data = json.loads(index.read_text())
        data["weight_map"] = dict.fromkeys(data["weight_map"], place)
        index.write_text(json.dumps(data))
        shutil.copy(compressed[2] / "model.safetensors", tmp_path / "other.safetensors")
        shutil.copy(compressed[2] / "model.safetensors", tmp_path / "repository" / "other.safetensors")
        with pytest.raises(ValueError, match="is no shard of the compressed checkpoint that names it"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "repository", subfolder="small")


def test_types_that_a_model_keeps_in_float32_stay_so(tiny, tmp_path):
    model = tiny("t5")
    prune(model, None, DSAConfig(0.6, "magnitude", "uniform"))
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "compressed", "compressed")
    loaded, plain = (
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name, dtype=torch.float16)
        for name in ("compressed", "dense")
    )
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == {
        name: value.dtype for name, value in plain.state_dict().items()
    }
    assert same_state(loaded, state(plain))


def test_trainer_makes_a_step_and_saves_an_ordinary_model(compressed, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(compressed[1], dtype=torch.float32)
    before, batch = state(loaded), [{"input_ids": row, "labels": row} for row in tokens(4)]
    options = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(loaded, TrainingArguments(**options, per_device_train_batch_size=4), train_dataset=batch)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert not same_state(loaded, before)
    trainer.save_model(tmp_path / "saved")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), state(loaded))


def test_peft_trains_saves_and_merges(compressed, tmp_path):
    peft = pytest.importorskip("peft")
    loaded = AutoModelForCausalLM.from_pretrained(compressed[1], dtype=torch.float32)
    model = peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ids = tokens(2)
    model(input_ids=ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(compressed[1], dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model(ids).logits)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), state(merged))


def test_a_loaded_model_leaves_no_trace_of_how_it_was_stored(compressed, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(compressed[1])
    assert not hasattr(loaded, "hf_quantizer") and not getattr(loaded, "is_quantized", False)
    for name in ("quantization_config", "transformers_weights"):
        assert not hasattr(loaded.config, name)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (compressed[2] / "config.json").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == (compressed[2] / "model.safetensors").read_bytes()
    assert find_shards(tmp_path).encoding is DENSE and not packed_headers(tmp_path / "model.safetensors")


def test_a_damaged_mask_is_an_error_and_no_random_weight(compressed, tmp_path):
    convert(compressed[2], tmp_path / "out", "compressed")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    name, header = next(iter(packed_headers(shard).items()))
    place = data.index(b"DSAMASK1") + header.mask.start
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_newer_format_says_to_upgrade(compressed, tmp_path):
    convert(compressed[2], tmp_path / "out", "compressed")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 99 of the format.*pip install .` in a newer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
