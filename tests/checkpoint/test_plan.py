"""A plan for a checkpoint is made without its weights, and is what a process then takes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    T5Config,
    ViTConfig,
)

from optimum_dsa import DSAConfig, UpdateConfig, ValuesConfig, demo_model, plan
from optimum_dsa.checkpoint.skeleton import open_skeleton, sample_model
from optimum_dsa.model.parameters import count_parameters
from optimum_dsa.pruning.allocation import measured_in_one_walk
from optimum_dsa.pruning.planning.work import Seconds

from ..test_commands import run


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SPECIAL = {f"{name}_token_id": 63 for name in ("pad", "bos", "eos", "cls", "sep")}


def folder(path: Path, config, name: str, dtype: str = "bfloat16") -> str:
    """A folder with nothing but the `config.json` of a model."""
    config.architectures, config.dtype = [name], dtype
    config.save_pretrained(path)
    return str(path)


def llama_8b(path: Path) -> str:
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    return folder(path, LlamaConfig(**sizes, **heads, tie_word_embeddings=False), "LlamaForCausalLM")


def test_a_configuration_alone_is_enough(tmp_path):
    found = plan(llama_8b(tmp_path), DSAConfig(0.6), run_block=False)
    assert found.parts["weights"] == 2 * 8_030_261_248 == found.disk["result"] > found.disk["finished blocks"]
    assert (found.text.samples, found.text.length, found.device, found.timed) == (128, 2048, "cpu", False)
    assert found.seconds > 60 and 18e9 < found.total < 25e9
    dense = plan(str(tmp_path), DSAConfig(0.6, "alps", update=UpdateConfig(targets="dense")), run_block=False)
    assert dense.phases["collecting"]["statistics"] == 4 * (3 * 4096 + 14336) + 4 * 2 * (3 * 4096**2 + 14336**2)


LARGE = {  # Llama-3's: layers, hidden size, MLP, heads, parameters
    "70B": (80, 8192, 28672, 64, 70_553_706_496),
    "405B": (126, 16384, 53248, 128, 405_853_388_800),
}


@pytest.mark.parametrize("name", LARGE)
def test_models_of_any_size_are_planned_from_a_file_alone_in_seconds(tmp_path, name):
    layers, hidden, inner, heads, parameters = LARGE[name]
    sizes = {"vocab_size": 128256, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    heads = {"num_attention_heads": heads, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    folder(tmp_path, LlamaConfig(**sizes, **heads, tie_word_embeddings=False), "LlamaForCausalLM")
    start = time.process_time()
    config = DSAConfig(0.5, "sparsegpt", "uniform")
    there = {"ranks": 8, "device_memory": 80 * 10**9}
    whole = plan(tmp_path / "config.json", config, **there, devices=8)
    spilled = plan(tmp_path, replace(config, activations="disk"), device_map={"": "disk"})
    assert time.process_time() - start < 10
    assert whole.disk["result"] == 2 * parameters and whole.seconds is None and whole.device == "a device of 80 GB"
    assert parameters / 8 <= whole.parts["weights"] / 2 < parameters / 7
    assert whole.phases["collecting"]["activations"] == 16 * 2048 * hidden * 2
    block = hidden * (2 * hidden + 2 * 1024 + 3 * inner) + 2 * hidden
    assert spilled.phases["loading"]["weights"] == 2 * max(block, 128256 * hidden)
    assert whole.fits == (name == "70B")
    assert spilled.disk["activations"] == 128 * 2048 * hidden * 2 and spilled.total < 100e9
    assert spilled.seconds > 3600 and not spilled.timed  # a block of it takes too long to be run for a plan


def test_ranks_on_a_cpu_share_its_memory_and_its_work(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_dsa.checkpoint.plan.speed", lambda *_: 1e12)
    monkeypatch.setattr("optimum_dsa.checkpoint.plan.memory_available", lambda _: 10**11)
    path, config = llama_8b(tmp_path), DSAConfig(0.6)
    one, four = (plan(path, config, run_block=False, ranks=ranks) for ranks in (1, 4))
    assert four.seconds == one.seconds / 4 and four.available < one.available / 3
    with pytest.raises(ValueError, match="at least 1; got 0 and 1"):
        plan(path, config, ranks=0)


def test_the_command_plans_for_devices_that_are_not_here(monkeypatch, capsys, tmp_path):
    file = Path(llama_8b(tmp_path), "config.json")
    options = ["-s", "0.6", "--ranks", "4", "--devices", "2", "--device-memory", "24GB"]
    code, output, errors = run(monkeypatch, capsys, "plan", str(file), *options)
    assert (code, errors) == (0, ""), errors
    assert "of each of 4 ranks with 2 devices" in output and "of 24 GB that are there" in output
    assert "on a device of 24 GB" in output and "time:" not in output and "libraries" not in output
    code, _, errors = run(monkeypatch, capsys, "plan", str(file), "-s", "0.6", "--device-memory", "much")
    assert code == 2 and "80GB; got 'much'" in errors


@pytest.mark.parametrize(
    "name,config",
    [
        (
            "T5ForConditionalGeneration",
            T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8),
        ),
        (
            "MixtralForCausalLM",
            MixtralConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=4,
            ),
        ),
    ],
)
def test_other_architectures_have_a_plan_too(tmp_path, name, config):
    path = folder(tmp_path, config, name, "float32")
    model, dtype = open_skeleton(path)
    assert dtype == torch.float32 and all(parameter.is_meta for parameter in model.parameters())
    found = plan(path, DSAConfig(0.5, "alps", update=UpdateConfig(targets="dense")), run_block=False)
    assert found.parts["weights"] == 4 * count_parameters(model) and found.fits


def test_the_time_is_that_of_a_block_which_is_run(monkeypatch):
    config = DSAConfig(0.5, data={"num_samples": 2, "sequence_length": 32})
    found = plan(demo_model(), config)
    assert found.timed and 0 < found.seconds < 600
    monkeypatch.setattr("optimum_dsa.checkpoint.plan.time_block", lambda *_: Seconds(1_843_200 // 10, 2.0, 0.5))
    assert plan(demo_model(), config).seconds == pytest.approx(10 * (2 + 0.5 * 64))
    model = sample_model(demo_model(), torch.float32, "cpu")
    assert len(model.model.layers) == 2 and model.device.type != "meta"


def test_every_allocation_that_auto_tries_is_in_the_time_and_the_memory(tmp_path, monkeypatch):
    # the same speed in both, whatever else the machine does meanwhile
    monkeypatch.setattr("optimum_dsa.checkpoint.plan.speed", lambda *_: 1e12)
    path, config = llama_8b(tmp_path), DSAConfig(0.6, "sparsegpt")
    named = plan(path, config, run_block=False)
    found = plan(path, replace(config, allocation="auto"), run_block=False)
    assert found.seconds > len(measured_in_one_walk()) * named.seconds * 0.8 and found.total > named.total + 10e9
    assert f"{len(measured_in_one_walk())} allocations are tried first, each judged on 32 x 2048 tokens" in found.line


def test_a_grid_is_in_the_time_and_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_dsa.checkpoint.plan.speed", lambda *_: 1e12)
    path = llama_8b(tmp_path)
    plain, absmax, mse, fed = (
        plan(path, DSAConfig(0.6, "magnitude", "uniform", values=values), run_block=False)
        for values in (
            ValuesConfig(),
            ValuesConfig("int8", scales="absmax", feedback=False),
            ValuesConfig("int8", feedback=False),
            ValuesConfig("int8"),
        )
    )
    assert absmax.seconds - plain.seconds == pytest.approx(700 * 32 * 218_103_808 / 1e12, rel=0.01)
    # the inputs of weights are read, too
    assert absmax.seconds + 12_300 * 32 * 218_103_808 / 1e12 < mse.seconds < fed.seconds
    assert fed.total > mse.total + 4 * 14336**2  # X·Xᵀ, and what is computed of it


def test_blocks_that_are_trained_together_are_not_planned_for_on_the_disk(tmp_path, monkeypatch):
    path, config = llama_8b(tmp_path), DSAConfig(0.6, reconstruct={"steps": 4, "span": 2})
    with pytest.raises(ValueError, match="span=2 trains blocks together.*use span=1"):
        plan(path, config, run_block=False, device_map="disk")
    monkeypatch.setattr("optimum_dsa.checkpoint.plan.memory_available", lambda _: 10**10)
    found = plan(path, config, run_block=False, device_map="auto")
    assert not found.fits and found.parts["weights"] > 16e9  # in memory, or not at all


@pytest.mark.parametrize("error", [ValueError, RuntimeError, AttributeError, KeyError])
def test_a_block_that_cannot_be_run_alone_leaves_arithmetic(monkeypatch, caplog, error):
    def broken(*args):
        raise error("no such\nblock")

    monkeypatch.setattr("optimum_dsa.checkpoint.plan.time_block", broken)
    found = plan(demo_model(), DSAConfig(0.5, data={"num_samples": 2, "sequence_length": 32}))
    assert found.seconds > 0 and not found.timed
    assert "no such" in caplog.text and "\n" not in caplog.messages[-1]


@pytest.mark.parametrize(
    "name,config,timed",
    [
        ("ViTForImageClassification", ViTConfig(image_size=16, patch_size=4, **SMALL), False),
        ("MambaForCausalLM", MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=3), True),
        ("ModernBertDecoderForCausalLM", ModernBertDecoderConfig(vocab_size=64, **SPECIAL, **SMALL), True),
    ],
)
def test_whatever_a_configuration_lets_be_changed_there_is_a_plan(tmp_path, caplog, name, config, timed):
    """Settings that a class finds by itself, checks or does not have: a block is run, or one line says why not."""
    found = plan(folder(tmp_path, config, name, "float32"), DSAConfig(0.5, data={"num_samples": 2}))
    assert found.seconds > 0 and found.timed is timed
    assert len(caplog.messages) == (0 if timed else 1) and not any("\n" in line for line in caplog.messages)
    assert found.text.length == (17 if "ViT" in name else found.text.length)


def test_what_does_not_fit_the_model_is_said(tmp_path):
    with pytest.raises(ValueError, match="needs in_features divisible by 7"):
        plan(demo_model(), DSAConfig(3 / 7, pattern="4:7", allocation="uniform"))
    with pytest.raises(OSError):
        plan(tmp_path / "nothing", DSAConfig(0.5))


def test_the_command_says_it_and_prints_it_as_json(monkeypatch, capsys, tmp_path):
    path = llama_8b(tmp_path)
    code, output, errors = run(monkeypatch, capsys, "plan", path, "-s", "0.6", "--quality", "fast", "--no-run")
    assert (code, errors) == (0, "") and "16 x 512 tokens" in output and "16.1 GB" in output
    code, output, errors = run(
        monkeypatch, capsys, "plan", path, "-s", "0.6", "--no-run", "--json", "-o", str(tmp_path)
    )
    found = json.loads(output)
    assert code == 0 and found["memory"]["total"] == sum(found["memory"]["parts"].values())
    assert found["model"] == path and found["timed"] is False


@pytest.mark.parametrize("command", ["prune", "plan", "search"])
@pytest.mark.parametrize(
    "options,named",
    [
        (["--method", "ria"], ["'good'", "--method ria", "leave out one"]),
        (["--update", "refit"], ["'good'", "--update refit"]),
        (["--targets", "sparse"], ["'good'", "--targets dense", "--targets sparse"]),
        (["--quality", "god"], ["Did you mean 'good'"]),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_loaded(monkeypatch, capsys, command, options, named):
    place = ["-o", "/dev/null/out"] if command != "plan" else []
    quality = [] if "--quality" in options else ["--quality", "good"]
    arguments = [command, "/nowhere", *place, "-s", "0.5", *quality, *options]
    code, output, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and output == "" and all(text in errors for text in named), errors


def test_a_quality_and_a_config_are_one_too_many(monkeypatch, capsys, tmp_path):
    DSAConfig(0.5).save_pretrained(tmp_path)
    arguments = ["prune", "/nowhere", "-o", str(tmp_path), "--config", str(tmp_path), "--quality", "good"]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "--quality good" in errors and "--config" in errors


def test_prune_says_what_a_quality_chose_and_what_it_will_need(monkeypatch, capsys, tmp_path, text):
    options = ["-s", "0.5", "--quality", "fast", "--dataset", text, "--num-samples", "2", "--sequence-length", "32"]
    code, output, errors = run(monkeypatch, capsys, "prune", str(demo_model()), "-o", str(tmp_path / "out"), *options)
    assert code == 0, errors
    first, second, *_ = output.splitlines()
    assert first == "quality fast: wanda; allocation dsa; 2 x 32 tokens"
    assert second.startswith("expected: about ") and "memory " in second and "disk 7.91 MB" in second


# As `optimum-cli dsa prune` does it: a plan, then the model.
MEASURED = """
import json, sys
import torch
from optimum_dsa import DSAConfig, DSAPruner, plan

config = DSAConfig.from_dict(json.loads(sys.argv[2]))
found = plan(sys.argv[1], config, run_block=False)
pruner = DSAPruner.from_pretrained(sys.argv[1])
# They are mapped from the file, and there when they are read: all of them, when the model is saved.
sum(parameter.sum() for parameter in pruner.model.parameters())
pruner.prune(torch.randint(1000, (config.data.num_samples, config.data.sequence_length)), config)
lines = open("/proc/self/status").read().splitlines()
peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
print(json.dumps([found.total, peak, found.parts["libraries"]]))
"""


@pytest.fixture(scope="module")
def planned_and_measured(tmp_path_factory):
    """By method, the bytes that were planned, measured, and those of the libraries."""
    place = str(tmp_path_factory.mktemp("measured") / "model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40000, "hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(place)
    plain = {"sparsity": 0.5, "num_samples": 16, "sequence_length": 128, "batch_size": 16}
    dense = {"targets": "dense", "true_sequential": True, "residual": True}
    settings = {
        "wanda": plain,
        "sparsegpt": plain | {"method": "sparsegpt"},
        "alps": plain | {"method": "alps"},
        "wanda int4": plain | {"values": "int4", "group": 32},
        "alps dense": plain | {"method": "alps", **dense},
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", MEASURED, place, json.dumps(given)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, given in settings.items()
    }
    return {name: json.loads(process.communicate()[0]) for name, process in processes.items()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is Linux's to say")
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "alps", "alps dense", "wanda int4"])
def test_the_memory_planned_is_the_memory_measured(planned_and_measured, name):
    planned, measured, libraries = planned_and_measured[name]
    assert abs(planned - measured) <= 0.2 * measured
    # Most of a small model's process is libraries: without them, too; what products take besides is the processor's.
    assert abs(planned - measured) <= 0.25 * (measured - libraries)


def test_a_file_that_is_no_configuration_is_told_by_its_own_name(tmp_path):
    for text, message in (("", r"other\.json is not JSON"), ("{}", r"other\.json says no model_type")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            plan(str(tmp_path / "other.json"), DSAConfig(0.5))
