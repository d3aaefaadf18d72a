"""The scripts in `examples/` run, and leave what they promise."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.demo import demo_model, demo_texts


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pruned model and a text."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "train.txt").write_text("\n".join(demo_texts("calibration"))[:20_000])
    pruner = DSAPruner.from_pretrained(demo_model())
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    pruner.save_pretrained(folder / "pruned")
    return folder


def run(script, *arguments, launcher=(), **environment):
    command = [sys.executable, *launcher, str(EXAMPLES / script), *map(str, arguments)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    settings["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_finetuning_on_two_processes_keeps_the_zeros(place):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1")
    launcher += ("--master_port", str(free_port()))
    run("finetune_pruned.py", place / "pruned", "-o", place / "two", "--text", place / "train.txt", *SMALL,
        launcher=launcher)  # fmt: skip
    check_zeros(place / "two", place / "pruned")
    assert json.loads((place / "two" / "dsa_config.json").read_text())["config"]["method"] == "magnitude"


def test_pruning_while_training_meets_the_budget(place):
    run("finetune_pruned.py", demo_model(), "-o", place / "grown", "--text", place / "train.txt", *SMALL,
        "--sparsity", 0.65)  # fmt: skip
    found = weights(place / "grown").values()
    assert sum(int((value == 0).sum()) for value in found) == round(0.65 * sum(value.numel() for value in found))


def test_recovery_with_peft_merges_into_the_same_zeros(place):
    output = run("recover_with_peft.py", place / "pruned", "-o", place / "merged", "--text", place / "train.txt",
                 *SMALL)  # fmt: skip
    assert "trainable params" in output
    check_zeros(place / "merged", place / "pruned")
