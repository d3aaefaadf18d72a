"""`python -m optimum_dsa`, alone and started by torchrun: the command as ranks run it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimum_dsa import demo_model


ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


CHILDREN = "/proc/{0}/task/{0}/children"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def command(*arguments, launcher=()):
    """`python [LAUNCHER] -m optimum_dsa ARGUMENTS`."""
    return [sys.executable, *launcher, "-m", "optimum_dsa", *map(str, arguments)]


def start(*arguments, launcher=()):
    """Exit code, output and errors of that, with one thread."""
    line = command(*arguments, launcher=launcher)
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300)
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
        assert output.count("expected: ") == 1 and ("on each of 2 ranks" in output) == (name == "two"), output
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / name / "dsa_config.json").read_text()) for name in ("one", "two"))
    changes = {"seconds": None, "checksum": None}  # which is of the seconds, too
    assert {**one, **changes} == {**two, **changes}
    assert sorted(path.name for path in tmp_path.iterdir() if "dsa" in path.name) == []


def content(folder):
    """Every file by its bytes; of what a run says of itself all but its seconds."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "dsa_manifest.json"}
    told = json.loads(found.pop("dsa_config.json"))
    return found, {name: value for name, value in told.items() if name not in ("seconds", "checksum")}


@pytest.mark.skipif(not Path(CHILDREN.format(os.getpid())).exists(), reason="who was started is Linux's to say")
def test_two_processes_with_the_model_on_disk_are_killed_and_one_ends_with_the_bytes_of_one(tmp_path, text):
    options = f"-s 0.5 --method sparsegpt --num-samples 5 --sequence-length 16 --batch-size 1 --dataset {text}".split()
    options += ["--device-map", "disk", "--activations", "disk", "--resume"]
    code, _, errors = start("prune", demo_model(), "-o", tmp_path / "one", *options)
    assert code == 0, errors
    line = ["prune", demo_model(), "-o", tmp_path / "two", *options]
    scratch, blocks = tmp_path / "scratch", tmp_path / ".two.dsa-work" / "blocks"
    with subprocess.Popen(
        command(*line, "--offload-folder", scratch, launcher=TORCHRUN),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as launcher:
        while launcher.poll() is None and len(list(blocks.glob("block-*.safetensors"))) < 3:
            time.sleep(0.01)
        workers = map(int, Path(CHILDREN.format(launcher.pid)).read_text().split())
        for process in [launcher.pid, *workers]:
            os.kill(process, signal.SIGKILL)
    assert launcher.returncode == -signal.SIGKILL
    assert len(list(blocks.glob("block-*.safetensors"))) < 10 and not (tmp_path / "two").exists()
    # Blocks are written once: the second process reads the file of the first.
    assert sorted(path.name for path in scratch.rglob("*.safetensors") if "layers" in path.name) == []
    code, _, errors = start(*line)
    assert code == 0, errors
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_what_two_processes_cannot_do_is_said_once(tmp_path):
    code, output, errors = start("verify", tmp_path, launcher=TORCHRUN)
    assert code != 0 and output == ""
    assert errors.count("verify runs in one process, and 2 were started") == 1
    code, output, errors = start("prune", tmp_path, "-s", "0.5", "-s", "0.6", launcher=TORCHRUN)
    assert code != 0 and errors.count("-s is given twice") == 1
