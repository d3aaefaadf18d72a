"""Prune a checkpoint that is larger than the memory for it, kill the command twice, and go on.

A random bf16 Llama is written shard by shard, and pruned by `optimum-cli dsa prune --device-map disk --activations
disk --resume`: once undisturbed, and once more in a process that is killed (SIGKILL) when a third and when two thirds
of its blocks are finished, by the same line every time. Said and checked: the same bytes in the end (of weights, index
and configuration; `dsa_config.json` but for its seconds), the zeros that were asked for, the highest anonymous memory
(RssAnon, sampled) of any of these processes against a limit, and what `optimum-cli dsa plan` had said of it. The same
of a cut of channels, of which `plan` says nothing and `verify` how many stay.

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
from typing import NamedTuple

import torch
from larger_than_memory import MB, VOCABULARY, check, digests, verify, write_checkpoint


METHODS = {
    "wanda 2:4": ["--method", "wanda", "--pattern", "2:4"],
    "sparsegpt 50 %": ["--method", "sparsegpt"],
    "channels 50 %": ["--structures", "ffn"],
}
SAMPLES, LENGTH = 16, 128
# Freed memory is handed back, as it would not be from the C library's own pool.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1000000", "TOKENIZERS_PARALLELISM": "false"}


def command(name: str, source: Path, *options: str) -> list[str]:
    """The command line `optimum-cli dsa NAME` of a prune, with all that the result depends on."""
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
    return [*plain_command(name, source), *asked, *text, *options]


def plain_command(name: str, source: Path) -> list[str]:
    """The command line `optimum-cli dsa NAME SOURCE`."""
    return [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "dsa", name, str(source)]


class Used(NamedTuple):
    """The most bytes that a process had, anonymous ones (RssAnon, sampled) and all (VmHWM), and its seconds."""

    anonymous: int = 0
    resident: int = 0
    seconds: float = 0.0

    def now(self, process: subprocess.Popen, start: float) -> Used:
        """With what the process has now; the same once it is gone."""
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return self
        found = dict(re.findall(r"(RssAnon|VmHWM):\s+(\d+) kB", text))
        anonymous, resident = (int(found.get(name, 0)) * 1024 for name in ("RssAnon", "VmHWM"))
        return Used(max(anonymous, self.anonymous), max(resident, self.resident), time.perf_counter() - start)


def pruned(source: Path, out: Path, options: list[str], kill_at: int | None = None) -> Used:
    """Run the command, to its end or until so many blocks are finished."""
    work = out.with_name(f".{out.name}.dsa-work") / "blocks"
    arguments = command("prune", source, "-o", str(out), "--resume", "-q", *options)
    start, used = time.perf_counter(), Used()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            arguments, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=errors, text=True
        )
        while process.poll() is None:
            used = used.now(process, start)
            if kill_at is not None and len(list(work.glob("block-*.safetensors"))) >= kill_at:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        expected = 0 if kill_at is None else -signal.SIGKILL
        errors.seek(0)
        check(process.returncode == expected, f"ended with {process.returncode}: {errors.read()[-2000:]}")
    return used


def content(folder: Path) -> dict[str, str]:
    """Every file of a result and what tells its bytes; of `dsa_config.json` all but what is of one run alone."""
    found = digests(folder)
    described = json.loads((folder / "dsa_config.json").read_text())
    for part in (described, described.get("structured") or {}):
        for name in ("seconds", "checksum"):
            part.pop(name, None)
    del found["dsa_manifest.json"]  # the hashes of all, that of `dsa_config.json` too
    return found | {"dsa_config.json": json.dumps(described, sort_keys=True)}


def planned(source: Path, options: list[str]) -> int:
    """Bytes of memory that `optimum-cli dsa plan` tells of the run, the whole process."""
    return json.loads(said(command("plan", source, "--no-run", "--json", *options)))["memory"]["total"]


def said(arguments: list[str]) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    check(done.returncode == 0, done.stderr[-2000:])
    return done.stdout


def measure(source: Path, folder: Path, layers: int, name: str) -> int:
    """One method: undisturbed, killed twice and resumed; says what was measured. The most anonymous bytes."""
    options = [*METHODS[name], "--dataset", str(source.with_name("tokens.jsonl"))]
    out = folder / "out"
    cuts = "--structures" in options
    plan = "" if cuts else f", planned {planned(source, options) / 1e9:.2f} GB"
    alone = pruned(source, out, options)
    if cuts:
        said(plain_command("verify", out))
    else:
        verify(source, out, updated="sparsegpt" in name)
    whole = content(out)
    shutil.rmtree(out)
    runs = [pruned(source, out, options, max(layers * third // 3, 1)) for third in (1, 2)]
    runs.append(pruned(source, out, options))
    check(content(out) == whole, f"{name}: the result of the run that was killed is another.")
    shutil.rmtree(out)
    most = Used(*(max(values) for values in zip(alone, *runs)))
    took = f"{alone.seconds:.0f} s, {sum(run.seconds for run in runs):.0f} s in three"
    memory = f"anonymous {most.anonymous / 1e9:.2f} GB, resident {most.resident / 1e9:.2f} GB"
    print(f"{name}: the same bytes; {memory}{plan}; {took}", flush=True)
    return most.anonymous


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
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--folder", help="where everything is written (default: temporary)")
    args = parser.parse_args()
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder, "original")
        size = write_checkpoint(source, args.hidden, args.layers, args.shard * MB)
        write_tokens(source.with_name("tokens.jsonl"))
        before = digests(source)
        print(
            f"checkpoint {size / 1e9:.2f} GB, limit {args.limit:.2f} GB, {torch.get_num_threads()} threads", flush=True
        )
        for name in args.methods:
            used = measure(source, Path(folder), args.layers, name)
            check(used <= args.limit * 1e9, f"{name}: {used:,} bytes of anonymous memory.")
        check(digests(source) == before, "The original checkpoint was changed.")


if __name__ == "__main__":
    main()
