"""`python -m optimum_dsa`, alone and started by torchrun: the command as ranks run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_dsa import demo_model


ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def start(*arguments, launcher=()):
    """Exit code, output and errors of `python [LAUNCHER] -m optimum_dsa ARGUMENTS`, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, *launcher, "-m", "optimum_dsa", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.contract
def test_two_processes_write_the_checkpoint_of_one_and_speak_once(tmp_path, text):
    options = [
        "--dataset",
        text,
        "-s",
        "0.6",
        "--method",
        "sparsegpt",
        "--num-samples",
        "9",
        "--sequence-length",
        "32",
    ]
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        code, output, errors = start(
            "prune", demo_model(), "-o", tmp_path / name, "--batch-size", "2", *options, launcher=launcher
        )
        assert code == 0, errors
        assert output.count(f"saved to {tmp_path / name}") == output.count("all parameters") == 1, output
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / name / "dsa_config.json").read_text()) for name in ("one", "two"))
    changes = {"seconds": None, "checksum": None}  # which is of the seconds, too
    assert {**one, **changes} == {**two, **changes}
    assert sorted(path.name for path in tmp_path.iterdir() if "dsa" in path.name) == []


def test_what_two_processes_cannot_do_is_said_once(tmp_path):
    code, output, errors = start("verify", tmp_path, launcher=TORCHRUN)
    assert code != 0 and output == ""
    assert errors.count("verify runs in one process, and 2 were started") == 1
