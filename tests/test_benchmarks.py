"""The scripts in examples/benchmarks run, small."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from optimum_dsa import perplexity
from optimum_dsa.packed import loading
from optimum_dsa.pruning.finished import FinishedBlocks

from .test_commands import run
from .tiny import bos_tokenizer, tiny_llama, tokens


FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


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


def test_the_frontier_prunes_with_what_its_search_finds(monkeypatch, tmp_path):
    module = script("frontier")
    tiny_llama().save_pretrained(tmp_path / "model")
    parts = {"calibration": tokens(), "validation": tokens(8, 16, seed=5), "test": tokens(8, 16, seed=6)}
    save_file(parts, tmp_path / "tokens.safetensors")
    rows = tmp_path / "rows.jsonl"
    asked = ["--rows", "all, searched", "--strategy", "curves", "--budget", "2k tokens", "--steps", "1"]
    places = [str(tmp_path / "model"), "--tokens", str(tmp_path / "tokens.safetensors"), "--output", str(rows)]
    monkeypatch.setattr("sys.argv", ["frontier.py", *places, *asked, "--rate", "1e-4", "--device", "cpu"])
    module.main()
    row = json.loads(rows.read_text().splitlines()[-1])["row"]
    assert row["sparsity"] == pytest.approx(0.7, abs=1e-3) and row["reconstruction"]
    (found,) = tmp_path.glob("rows.jsonl.search-curves-2k-tokens-0-7-alps/allocation.json")
    assert json.loads(found.read_text()) == row["allocation"] and row["allocation"]["granularity"] == "matrix"


def test_whole_numbers_are_measured_against_the_same_weights(monkeypatch, tmp_path):
    module = script("quantised")
    tiny_llama().save_pretrained(tmp_path / "model")
    parts = {"calibration": tokens(), "validation": tokens(8, 16, seed=5)}
    save_file(parts, tmp_path / "tokens.safetensors")
    output = tmp_path / "rows.jsonl"
    places = [str(tmp_path / "model"), "--tokens", str(tmp_path / "tokens.safetensors"), "--output", str(output)]
    asked = ["--rows", "bf16", "int8 0 absmax", "int4 32 mse", "int4 32 feedback", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["quantised.py", *places, *asked])
    module.main()
    rows = {row["row"]: row for row in (json.loads(line)["row"] for line in output.read_text().splitlines())}
    assert rows["int8 0 absmax"]["validation"] == pytest.approx(rows["bf16"]["validation"], rel=1e-2)
    assert rows["int4 32 mse"]["bits"] == rows["int4 32 feedback"]["bits"] < rows["int8 0 absmax"]["bits"]


def test_gpu(monkeypatch, capsys, tmp_path):
    module = script("gpu")
    model = module.llama((64, 96, 2, 4, 2), torch.device("cpu"), torch.float32)
    model.save_pretrained(tmp_path / "model")
    save_file(
        {"calibration": module.windows(8, 16), "test": module.windows(4, 16, 3)}, tmp_path / "tokens.safetensors"
    )
    places = ["--model", str(tmp_path / "model"), "--tokens", str(tmp_path / "tokens.safetensors")]
    monkeypatch.setattr("sys.argv", ["gpu.py", *places])
    module.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(row[0] for row in rows[1:-1])) == [*module.PARTS]
    for part in ("1b", "8b"):
        assert [row[1] for row in rows if row[0] == part][1:] == [*module.METHODS]
    assert [row[1] for row in rows if row[0] == "model"][1:] == ["dense", "wanda", "sparsegpt", "alps", "alps,"]
    kinds = {"2:4", "50", "60", "70", "80"}
    assert {row[1] for row in rows if row[0] == "layers" and "float64" in row} == kinds
    speeds = [row for row in rows if row[0] == "decode"][1:]
    assert [row[1] for row in speeds] == ["dense", "2:4", "2:4", "2:4", "60", "60"]
    assert all("tokens/s" in row for row in speeds)
    # A GPU's masks are those of the CPU; without one both are.
    shares = {row[1]: float(row[2].rstrip("%")) for row in rows if row[0] == "equal"}
    assert shares["wanda"] == shares["magnitude"] == shares["ria"] == 0 and shares["sparsegpt"] < 1
    monkeypatch.setattr("sys.argv", ["gpu.py", "--minutes", "0"])
    module.main()
    assert "left out" in capsys.readouterr().out


def test_smaller_models_stand_in_rows_beside_flap(monkeypatch, capsys, tmp_path):
    module = script("structured")
    tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    parts = {"calibration": tokens(), "validation": tokens(8, 16, seed=5), "test": tokens(8, 16, seed=6)}
    save_file(parts, tmp_path / "tokens.safetensors")
    rows = tmp_path / "rows.jsonl"
    asked = ["--shares", "0.4", "--steps", "1", "--learn-steps", "2", "--budget", "2k tokens", "--device", "cpu"]
    asked += ["--rows", "obs, refit, searched", "flap", "blocks", "projected_gates, all"]
    places = [str(tmp_path / "model"), "--tokens", str(tmp_path / "tokens.safetensors"), "--output", str(rows)]
    monkeypatch.setattr("sys.argv", ["structured.py", *places, *asked])
    module.main()
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["0.4 flap", "0.4 obs, refit, searched", "0.4 blocks", "0.4 projected_gates, all"]
    found = [json.loads(line)["row"] for line in rows.read_text().splitlines()[1:]]
    assert all(0 < row["share"] <= 0.4 for row in found)
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in found) and found[1]["allocation"]["sparsity"]
    written = rows.read_text()
    module.main()  # nothing is run again
    assert rows.read_text() == written


def test_smaller_models_are_trained_and_measured_as_another_process_loads_them(monkeypatch, tmp_path):
    module = script("structured_recovery")
    tiny_llama().save_pretrained(tmp_path / "model")
    bos_tokenizer().save_pretrained(tmp_path / "model")
    parts = {"calibration": tokens(), "validation": tokens(8, 16, seed=5), "test": tokens(8, 16, seed=6)}
    save_file(parts, tmp_path / "tokens.safetensors")
    rows, smaller = tmp_path / "rows.jsonl", tmp_path / "smaller"
    places = [tmp_path / "model", "--tokens", tmp_path / "tokens.safetensors", "--output", rows, "--cut", smaller]
    asked = [
        "--rows",
        "full",
        "grouped",
        "--steps",
        "2",
        "--train-length",
        "8",
        "--group-size",
        "4",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr("sys.argv", ["structured_recovery.py", *map(str, places), *asked])
    module.main()
    dense, cut, *trained = (json.loads(line)["row"] for line in rows.read_text().splitlines())
    assert len(trained) == 2 and len({row["test"] for row in (dense, cut, *trained)}) == 4
    model = AutoModelForCausalLM.from_pretrained(smaller, dtype=torch.float32).eval()
    assert cut["test"] == round(perplexity(model, parts["test"], 8), 3)
    written, seen = rows.read_text(), (smaller / "model.safetensors").stat().st_mtime_ns
    module.main()  # nothing is run again
    monkeypatch.setattr("sys.argv", [*sys.argv, "--share", "0.5"])
    with pytest.raises(SystemExit, match="smaller holds a model that --output knows no row of"):
        module.main()
    assert rows.read_text() == written and (smaller / "model.safetensors").stat().st_mtime_ns == seen


def test_every_row_of_smaller_models_can_be_asked_for(monkeypatch):
    module = script("structured")
    monkeypatch.setattr("sys.argv", ["structured.py"])
    args = module.parse()
    assert all(module.config_of(row, 0.2, args).sparsity == 0.2 for row in module.ROWS)


def test_packed(monkeypatch, capsys):
    module = script("packed")
    monkeypatch.setenv("OPTIMUM_DSA_KERNELS", "reference")
    monkeypatch.setattr(loading, "_found", None)
    threads = torch.get_num_threads()
    module.main(["--shapes", "64x128", "--sparsity", "0.5", "--threads", "1", "--batch", "1", "9", "--rounds", "2"])
    output = capsys.readouterr().out
    torch.set_num_threads(threads)
    assert len(re.findall(r"^64x128, 50% zeros, 0\.\d+ of the bytes$", output, re.MULTILINE)) == 1
    row = r"^  batch \d, threads 1: torch [\d.]+ ms; reference [\d.]+ \[.*\], reference int8 .*, reference int4 .*\]$"
    assert len(re.findall(row, output, re.MULTILINE)) == 2


def test_all_forms_of_a_model_run_beside_each_other(monkeypatch, capsys):
    module = script("running")
    monkeypatch.setattr(
        "sys.argv", ["running.py", "--small", "--new-tokens", "4", "--rounds", "1", "--sparsities", "0.6"]
    )
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["speeds"]
    held = {form: row["weight_bytes"] for form, row in found.items()}
    assert held["packed int8"] < held["packed"] < held["dense bf16"] < held["dense f32"]
    assert found["packed"]["flops"] < found["dense bf16"]["flops"]


def test_a_model_in_types_of_llama_cpp_stands_beside_pruned_ones(monkeypatch, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    module = script("llamacpp")
    options = "--types Q2_K --values bf16 --sparsities 0.5 --samples 2 --windows 1 --method magnitude"
    options += " --new-tokens 2 --prompt 2"
    monkeypatch.setattr("sys.argv", ["llamacpp.py", *options.split()])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["row"] for row in rows] == ["llama.cpp Q2_K", "mask 50% + bf16"]
    assert all(row["tokens/s"] > 0 and row["test"] > 1 for row in rows)
    # of 256 columns no matrix of this model has a multiple, and Q4_0 takes 4.5 bits
    assert [row["bytes"] for row in rows] == [0.281, 0.563] and rows[0]["fallback"] == "70 of 70"


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's to say")
@pytest.mark.parametrize("name", ["sparsegpt 50 %", "channels 50 %"])
def test_what_is_pruned_block_by_block_is_killed_and_goes_on_to_the_same_bytes(name, monkeypatch, capsys, tmp_path):
    """The first kill is one; what else are processes of their own runs here, and is cut where they would be killed."""
    module, real = script("block_by_block"), FinishedBlocks.add
    own, runs, checked = module.pruned, [], []

    def here(source, out, options, kill_at=None):
        runs.append(kill_at)
        if kill_at == 1:
            used = own(source, out, options, kill_at)
            assert used.resident > used.anonymous > 10**7 and used.seconds > 0
            return used

        def add(self, number, *others):
            if number == kill_at:
                raise KeyboardInterrupt
            real(self, number, *others)

        monkeypatch.setattr(FinishedBlocks, "add", add)
        arguments = module.command("prune", source, "-o", str(out), "--resume", "-q", *options)
        assert run(monkeypatch, capsys, *arguments[4:])[0] == (0 if kill_at is None else 130)
        return module.Used(10**9, 2 * 10**9, 1.0)

    monkeypatch.setattr(module, "pruned", here)
    monkeypatch.setattr(module, "planned", lambda *_: 3 * 10**9)
    monkeypatch.setattr(module, "said", lambda arguments: checked.append(arguments[3:5]))
    sizes = ["--hidden", "128", "--layers", "3", "--shard", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["block_by_block.py", "--methods", name, *sizes])
    module.main()
    output = capsys.readouterr().out
    assert runs == [None, 1, 2, None] and not any(tmp_path.iterdir())
    plan = ", planned 3.00 GB" if name.startswith("sparsegpt") else ""
    assert f"{name}: the same bytes; anonymous 1.00 GB, resident 2.00 GB{plan}; 1 s, " in output
    assert checked == ([] if plan else [["dsa", "verify"]])
