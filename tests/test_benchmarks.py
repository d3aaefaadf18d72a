"""The scripts in examples/benchmarks run, small."""

import importlib.util
import re
from pathlib import Path

import torch


FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_checkpoint(monkeypatch, capsys):
    module = script("checkpoint")
    monkeypatch.setattr(module, "measure_in_new_process", module.measure)
    monkeypatch.setattr("sys.argv", ["checkpoint.py", "--hidden", "256", "--layers", "2", "--matrix", "512"])
    module.main()
    output = capsys.readouterr().out
    shares = re.findall(r"^(50|60|70)% +(\d+\.\d)% +(\d+)%", output, re.MULTILINE)
    assert [share for share, _, _ in shares] == ["50", "60", "70"]
    assert all(float(found) <= float(limit) for _, found, limit in shares)
    assert len(re.findall(r"^(?:bfloat16|float16|float32) ", output, re.MULTILINE)) == 9
    assert torch.get_num_threads() == 1
