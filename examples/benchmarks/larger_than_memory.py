"""Prune a checkpoint that is larger than the memory it is given.

A random bf16 Llama is written shard by shard. A child process, held to a share of the checkpoint's size, loads it with
`device_map={"": "disk"}`, prunes it with wanda and saves it. Then every shard of the result is held against the
original: the number of zeros, every kept weight bit for bit, and the original's bytes. That the limit bites is shown
by a child that tries to load the checkpoint into memory.

The limit is RLIMIT_DATA: heap, private anonymous and private writable mappings, the interpreter's own 0.3 GB included.
RLIMIT_AS would also count the code of libraries and files that are only read. RLIMIT_DATA counts too much as well:
safetensors maps files privately, and a mapped file counts whole though no page of it is in memory. So the child has
safetensors read (its backend "pread", which transformers takes on Windows) instead of map: every weight in use is then
memory that counts. RssAnon, the memory that was really filled, is sampled beside it.

    python larger_than_memory.py                                                # 2.1 GB
    MALLOC_MMAP_THRESHOLD_=65536 python larger_than_memory.py --hidden 768 --layers 9 --shard 32 --beyond    # 0.15 GB
"""

import argparse
import hashlib
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import accelerate
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, find_architecture, prune


SPARSITY, VOCABULARY, MB = 0.5, 8192, 2**20
COUNTED = ("RssAnon", "VmData")
CONFIG = DSAConfig(SPARSITY, "wanda", "uniform", batch_size=8)


def write_checkpoint(folder: Path, hidden: int, layers: int, shard_bytes: int) -> int:
    """A random Llama in `folder`, of which at most one shard is in memory at a time; its size in bytes."""
    shape = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_attention_heads": hidden // 128}
    config = LlamaConfig(**shape, vocab_size=VOCABULARY, num_hidden_layers=layers, dtype="bfloat16")
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    weight_map, shard = {}, {}
    for name, shape in shapes.items():
        random = torch.randn(shape, generator=generator).mul_(0.02)
        shard[name] = (random if len(shape) > 1 else torch.ones(shape)).bfloat16()
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes or name == list(shapes)[-1]:
            file = f"model-{len(weight_map):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return size


def meta_model(config: LlamaConfig) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def read_instead_of_mapping() -> None:
    """From here on, safetensors files are read into memory that counts."""

    def read(*args, **kwargs):
        return safe_open(*args, **{**kwargs, "backend": "pread"})

    transformers.modeling_utils.safe_open = accelerate.utils.offload.safe_open = read


def status() -> dict[str, int]:
    """This process's RssAnon, and VmData, which RLIMIT_DATA limits, in bytes."""
    text = Path("/proc/self/status").read_text()
    return {name: int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024 for name in COUNTED}


def watch(peak: dict[str, int]) -> None:
    """Keep `peak` at the highest `status`, forever."""
    while True:
        peak |= {name: max(value, peak[name]) for name, value in status().items()}
        time.sleep(0.005)


def child(source: str, target: str, limit: int, shard: int, beyond: bool, plain: bool) -> None:
    """Load, prune and save under the limit; or, with `plain`, only try to load into memory."""
    before = dict.fromkeys(COUNTED, 0)
    if beyond:  # load all code first
        config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1)
        prune(LlamaForCausalLM(config).bfloat16(), torch.ones(8, 128, dtype=torch.long), CONFIG)
        before = status()
    resource.setrlimit(resource.RLIMIT_DATA, 2 * (before["VmData"] + limit,))
    read_instead_of_mapping()
    peak = status()
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    if plain:
        AutoModelForCausalLM.from_pretrained(source)
        return print("{}")
    times = [time.perf_counter()]
    pruner = DSAPruner.from_pretrained(source, device_map={"": "disk"}, offload_folder=f"{target}-offload")
    times.append(time.perf_counter())
    pruner.prune(torch.randint(0, VOCABULARY, (8, 128), generator=torch.Generator().manual_seed(0)), CONFIG)
    times.append(time.perf_counter())
    pruner.save_pretrained(target, max_shard_size=f"{shard}MB")
    times.append(time.perf_counter())
    seconds = {step: stop - start for step, start, stop in zip(("load", "prune", "save"), times, times[1:])}
    print(json.dumps({"seconds": seconds, "peak": {name: peak[name] - before[name] for name in COUNTED}}))


def run_child(**settings) -> dict | None:
    """What the child printed; `None` where memory ran out. Any other failure is raised."""
    command = [sys.executable, __file__, "--child", json.dumps(settings, default=str)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if re.search(r"MemoryError|not enough memory|Cannot allocate|memory allocation of \d+ bytes failed", done.stderr):
        return None
    raise RuntimeError(done.stderr[-3000:])


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        found[path.name] = digest.hexdigest()
    return found


def check(holds: bool, wrong: str) -> None:
    if not holds:
        raise AssertionError(wrong)


def verify(source: Path, target: Path, updated: bool = False) -> int:
    """Raise unless `target` is `source` with the asked number of zeros; the number of zeros.

    Kept weights are the source's, or `updated`.
    """
    architecture = find_architecture(meta_model(LlamaConfig.from_pretrained(source)))
    prunable = {weight.name: weight.size for weight in architecture.weights}
    origin = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    zeros, seen = 0, set()
    for file in sorted(target.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                seen.add(name)
                with safe_open(source / origin[name], "pt") as original:
                    before, after = original.get_tensor(name), shard.get_tensor(name)
                kept = after != 0 if name in prunable else torch.ones_like(after, dtype=torch.bool)
                same = torch.equal(before.view(torch.int16)[kept], after.view(torch.int16)[kept])
                check(same or (updated and name in prunable), f"{name}: kept weights changed.")
                removed, size = int((~kept).sum()), prunable.get(name, 0)
                check(abs(removed - SPARSITY * size) <= 1, f"{name}: {removed} of {size} weights are zero.")
                zeros += removed
    check(seen == origin.keys(), f"The saved checkpoint holds other weights: {sorted(seen ^ origin.keys())[:3]}.")
    check(zeros == round(SPARSITY * sum(prunable.values())), f"{zeros} zeros are not the number that was asked for.")
    return zeros


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 128 (default: 2048)")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--shard", type=int, default=200, help="MB per shard (default: 200, as in the package)")
    parser.add_argument("--share", type=float, default=0.6, help="memory limit / checkpoint size (default: 0.6)")
    parser.add_argument("--beyond", action="store_true", help="the limit is for what the child takes beyond its code")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(**json.loads(args.child))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "original"), Path(folder, "pruned")
        size = write_checkpoint(source, args.hidden, args.layers, args.shard * MB)
        limit = int(args.share * size)
        before = digests(source)
        print(f"checkpoint           {size / MB:6.0f} MB")
        print(f"memory limit         {limit / MB:6.0f} MB  {limit / size:.0%}{'  beyond code' if args.beyond else ''}")
        settings = {"source": source, "target": target, "limit": limit, "shard": args.shard, "beyond": args.beyond}
        plain = run_child(**settings, plain=True)
        print(f"loading into memory: {'fits, so the limit proves nothing' if plain is not None else 'refused'}")
        done = run_child(**settings, plain=False)
        if done is None:
            raise SystemExit("pruning from disk:   out of memory")
        for name, value in done["peak"].items():
            print(f"pruning, peak {name:<7}{value / MB:6.0f} MB  {value / size:.0%}")
        print("seconds:             " + ", ".join(f"{name} {value:.1f}" for name, value in done["seconds"].items()))
        zeros = verify(source, target)
        check(digests(source) == before, "The original checkpoint was changed.")
        logits = AutoModelForCausalLM.from_pretrained(target)(torch.arange(16)[None]).logits
        check(bool(logits.isfinite().all()), "The saved model's logits are not finite.")
        print(f"verified:            {zeros:,} zeros, kept weights and original unchanged, the saved model runs")


if __name__ == "__main__":
    main()
