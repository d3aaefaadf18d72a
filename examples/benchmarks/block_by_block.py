"""Prune a checkpoint that is larger than the memory for it, kill the command twice, and go on.

A random bf16 Llama is written shard by shard, and pruned by `optimum-cli dsa prune --device-map disk --activations
disk --resume`: once undisturbed, and once more in a process that is killed (SIGKILL) when a third and when two thirds
of its blocks are finished, by the same line every time. Said and checked: the same bytes in the end (of weights, index
and configuration; `dsa_config.json` but for its seconds), the zeros that were asked for, the highest anonymous memory
(RssAnon, sampled) of any of these processes against a limit, and what `optimum-cli dsa plan` had said of it.

    python block_by_block.py                                                    # 6 GB, under 2 GB
    python block_by_block.py --hidden 1024 --layers 20 --limit 1.2              # 0.6 GB
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from larger_than_memory import MB, VOCABULARY, check, digests, verify, write_checkpoint


METHODS = {
    "wanda 2:4": ["--method", "wanda", "--pattern", "2:4"],
    "sparsegpt 50 %": ["--method", "sparsegpt"],
}
SAMPLES, LENGTH = 16, 128
# Freed memory is handed back, as it would not be from the C library's own pool.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1000000", "TOKENIZERS_PARALLELISM": "false"}


def command(name: str, source: Path, *options: str) -> list[str]:
    """The command line `optimum-cli dsa NAME`, with all that the result depends on."""
    asked = [
        "-s",
        "0.5",
        "--allocation",
        "uniform",
        "--device",
        "cpu",
        "--device-map",
        "disk",
        "--activations",
        "disk",
    ]
    text = ["--num-samples", str(SAMPLES), "--sequence-length", str(LENGTH)]
    run = "from optimum.commands.optimum_cli import main; main()"
    return [sys.executable, "-c", run, "dsa", name, str(source), *asked, *text, *options]


def anonymous(process: subprocess.Popen) -> int:
    """RssAnon of a process in bytes; 0 once it is gone."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def pruned(source: Path, out: Path, options: list[str], kill_at: int | None = None) -> tuple[int, float]:
    """Run the command, to its end or until so many blocks are finished; its peak in bytes, and seconds."""
    work = out.with_name(f".{out.name}.dsa-work") / "blocks"
    arguments = command("prune", source, "-o", str(out), "--resume", "-q", *options)
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            arguments, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=errors, text=True
        )
        while process.poll() is None:
            peak = max(peak, anonymous(process))
            if kill_at is not None and len(list(work.glob("block-*.safetensors"))) >= kill_at:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        expected = 0 if kill_at is None else -signal.SIGKILL
        errors.seek(0)
        check(process.returncode == expected, f"ended with {process.returncode}: {errors.read()[-2000:]}")
    return peak, time.perf_counter() - start


def content(folder: Path) -> dict[str, str]:
    """Every file of a result and what tells its bytes; of `dsa_config.json` all but what is of one run alone."""
    found = digests(folder)
    described = json.loads((folder / "dsa_config.json").read_text())
    for name in ("seconds", "checksum"):
        del described[name]
    del found["dsa_manifest.json"]  # the hashes of all, that of `dsa_config.json` too
    return found | {"dsa_config.json": json.dumps(described, sort_keys=True)}


def planned(source: Path, options: list[str]) -> dict[str, int]:
    """Bytes that `optimum-cli dsa plan` tells of the run: in all, and of the libraries."""
    arguments = command("plan", source, "--no-run", "--json", *options)
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    check(done.returncode == 0, done.stderr[-2000:])
    memory = json.loads(done.stdout)["memory"]
    return {"total": memory["total"], "libraries": memory["parts"].get("libraries", 0)}


def measure(source: Path, folder: Path, layers: int, name: str) -> dict[str, float]:
    """One method: undisturbed, killed twice and resumed; bytes and seconds."""
    options = [*METHODS[name], "--dataset", str(source.with_name("tokens.jsonl"))]
    out = folder / "out"
    plan = planned(source, options)
    peak, seconds = pruned(source, out, options)
    verify(source, out, updated="sparsegpt" in name)
    whole = content(out)
    shutil.rmtree(out)
    runs = [pruned(source, out, options, max(layers * third // 3, 1)) for third in (1, 2)]
    runs.append(pruned(source, out, options))
    check(content(out) == whole, f"{name}: the result of the run that was killed is another.")
    shutil.rmtree(out)
    peaks = [peak, *(one for one, _ in runs)]
    return {
        "planned": plan["total"],
        "planned without libraries": plan["total"] - plan["libraries"],
        "peak": max(peaks),
        "peak undisturbed": peak,
        "seconds": seconds,
        "seconds in three": sum(took for _, took in runs),
    }


def write_tokens(path: Path) -> None:
    """Random windows, a row of token ids each."""
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tokens.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hidden", type=int, default=2048, help="a multiple of 128; MLPs are 11/4 of it (default: 2048)"
    )
    parser.add_argument("--layers", type=int, default=58, help="default: 58, which makes 6 GB")
    parser.add_argument("--shard", type=int, default=500, help="MB per shard of the original (default: 500)")
    parser.add_argument("--limit", type=float, default=2.0, help="GB of anonymous memory (default: 2)")
    parser.add_argument("--folder", help="where everything is written (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder, "original")
        size = write_checkpoint(source, args.hidden, args.layers, args.shard * MB)
        write_tokens(source.with_name("tokens.jsonl"))
        before = digests(source)
        print(
            f"checkpoint {size / 1e9:.2f} GB, limit {args.limit:.2f} GB, {torch.get_num_threads()} threads", flush=True
        )
        for name in METHODS:
            found = measure(source, Path(folder), args.layers, name)
            said = ", ".join(
                f"{what} {value:.0f} s" if "seconds" in what else f"{what} {value / 1e9:.2f} GB"
                for what, value in found.items()
            )
            print(f"{name}: the same bytes; {said}", flush=True)
            check(found["peak"] <= args.limit * 1e9, f"{name}: {found['peak']:,} bytes of anonymous memory.")
        check(digests(source) == before, "The original checkpoint was changed.")


if __name__ == "__main__":
    main()
