"""The scripts in `examples/` run, and leave what they promise."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.commands.embedded import demo_model, demo_texts


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pruned model and a text."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "train.txt").write_text("\n".join(demo_texts("calibration"))[:20_000])
    pruner = DSAPruner.from_pretrained(demo_model())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform", pattern="row"))
    pruner.save_pretrained(folder / "pruned")
    return folder


def run(monkeypatch, script, *arguments):
    """Run a script in this process, which has loaded torch already."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


# Runs a script with torch as on a machine with one GPU, where nothing is computed on it.
ONE_GPU = """
import runpy, sys
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def torchrun(wrapper, script, *arguments, processes=2):
    """Run a script as `torchrun` does, in processes of their own that see one GPU; what it writes to stderr."""
    wrapper.write_text(ONE_GPU)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1"]
    command = [sys.executable, *launcher, f"--master_port={port}", wrapper, EXAMPLES / script, *arguments]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def weights(folder):
    loaded = load_file(Path(folder) / "model.safetensors")
    return {name: value for name, value in loaded.items() if "layers" in name and value.dim() == 2}


def check_zeros(folder, other):
    """Both models have the same zeros, and other weights differ."""
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value == 0, expected[name] == 0), name
    assert any(not torch.equal(value.float(), expected[name].float()) for name, value in found.items())


SMALL = ("--steps", 3, "--batch-size", 2, "--length", 32)


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a torch with CUDA asks the driver that is not there",
)
def test_two_processes_with_one_gpu_prune_to_the_budget_on_the_cpu_and_keep_every_zero(place):
    arguments = ("-o", place / "two", "--text", place / "train.txt", *SMALL, "--sparsity", 0.7, "--samples", 8)
    said = torchrun(place / "one_gpu.py", "finetune_pruned.py", place / "pruned", *arguments)
    assert said.count("2 processes and 1 GPU on this machine") == 1
    found, before = weights(place / "two"), weights(place / "pruned")
    assert all((found[name][value == 0] == 0).all() for name, value in before.items())
    zeros = sum(int((value == 0).sum()) for value in found.values())  # after the last pruning came another step
    assert zeros == round(0.7 * sum(value.numel() for value in found.values()))
    described = json.loads((place / "two" / "dsa_config.json").read_text())
    assert described["achieved"]["removed"] == zeros


def test_finetuning_keeps_the_zeros(monkeypatch, place):
    arguments = ("-o", place / "tuned", "--text", place / "train.txt", *SMALL)
    run(monkeypatch, "finetune_pruned.py", place / "pruned", *arguments)
    check_zeros(place / "tuned", place / "pruned")
    assert json.loads((place / "tuned" / "dsa_config.json").read_text())["config"]["method"] == "magnitude"


def test_recovery_with_peft_merges_into_the_same_zeros(monkeypatch, capsys, place):
    arguments = ("-o", place / "merged", "--text", place / "train.txt", *SMALL)
    run(monkeypatch, "recover_with_peft.py", place / "pruned", *arguments)
    assert "trainable params" in capsys.readouterr().out
    check_zeros(place / "merged", place / "pruned")


def test_the_benchmark_of_recovery_counts_zeros_and_costs(monkeypatch, capsys):
    small = ("--steps", 1, "--batch-size", 1, "--test", 2, "--repeats", 1, "--rank", 2, "--samples", 4)
    names = ("none", "lora", "mask", "elsa")
    run(monkeypatch, "benchmarks/recovery.py", *small, "--sampled", 2, "--only", "quality", "--rows", *names)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.split()[0] in names}
    assert len(rows) == 4
    for row in rows.values():
        assert row[4] == row[6] and row[7] == "0"  # all zeros kept, or as many, and none beyond
