"""Searches in processes of their own: killed, or several at once."""

import json
import subprocess
import sys
from pathlib import Path

from optimum_dsa.search.trace import SearchTrace


# A search on a small random model; arguments: the folder, and what stands in ACT.
PROGRAM = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from optimum_dsa import Calibration, DSAConfig
from optimum_dsa.search.search import search
from tests.tiny import tiny_llama, tokens

def run(**options):
    options = {"budget": "12k tokens", "named": ["owl", "dsa", "atp"], "folder": sys.argv[1], **options}
    calibration = Calibration({"input_ids": tokens()}, "x")
    return search(tiny_llama(), calibration, tokens(8, 16, seed=5), DSAConfig(0.7), strategy="auto", **options)
"""
KILLED = """
def lines():
    path = sys.argv[1] + "/trace.jsonl"
    return open(path).read().count("\\n") if os.path.exists(path) else 0

rng, kills = random.Random(0), 0
while kills < 10:
    until, child = lines() + rng.randint(1, 3), os.fork()  # few: the kill comes late on a busy machine
    if child == 0:
        run(resume=True)
        os._exit(0)
    while lines() < until and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.0002)
    if lines() < until:
        break  # it came to its end
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
run(resume=True)
print("kills", kills)
"""
ROOT = Path(__file__).resolve().parents[2]


def program(*arguments, launcher=()):
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trials(folder):
    return [
        {name: value for name, value in json.loads(trial.to_json()).items() if name != "seconds"}
        for trial in SearchTrace.load(folder / "trace.jsonl").trials
    ]


def outcome(folder):
    result = json.loads((folder / "search.json").read_text())
    return {name: value for name, value in result.items() if name not in ("seconds", "processes", "efficiency")}


def test_a_search_killed_ten_times_and_one_of_two_processes_end_as_an_undisturbed_one(tmp_path):
    (tmp_path / "whole.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}\nrun()\n")
    (tmp_path / "killed.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}\n{KILLED}")
    program(tmp_path / "whole.py", tmp_path / "whole")
    assert "kills 10" in program(tmp_path / "killed.py", tmp_path / "killed")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    program(tmp_path / "whole.py", tmp_path / "two", launcher=launcher)
    expected = trials(tmp_path / "whole")
    assert len(expected) > 60
    for name in ("killed", "two"):
        assert trials(tmp_path / name) == expected
        assert outcome(tmp_path / name) == outcome(tmp_path / "whole")
    told = json.loads((tmp_path / "two" / "search.json").read_text())
    assert 0 < told["efficiency"] <= 1 and all(shift["tokens"] for shift in told["processes"])


# torch as on a machine with one GPU, where nothing is computed on it.
ONE_GPU = """
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
from optimum_dsa.common.devices import own_device, process_state
sys.stdout.write(f"works on {own_device()} {process_state().backend}\\n")  # in one piece, beside the other process
"""


def test_two_processes_that_see_one_gpu_search_on_the_cpu(tmp_path):
    begin = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}\n"
    run = "run(budget='3k tokens')\n"
    (tmp_path / "plain.py").write_text(begin + run)
    (tmp_path / "two.py").write_text(begin + ONE_GPU + run)
    program(tmp_path / "plain.py", tmp_path / "plain")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    said = program(tmp_path / "two.py", tmp_path / "two", launcher=launcher)  # older ones of gloo print there too
    assert said.count("works on cpu gloo") == said.count("works on") == 2
    assert trials(tmp_path / "two") == trials(tmp_path / "plain") != []
