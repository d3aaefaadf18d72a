"""What mask-compressed checkpoints cost and save: bytes on disk, speed of packing, memory while loading.

A random bf16 Llama is pruned by magnitude at 50, 60 and 70 %, saved dense and converted. Printed are the bytes of the
pruned matrices and of the whole file (embeddings stay dense) against the dense ones; the speed of packing and
unpacking one matrix in memory, in one thread; the time to convert and to load; and the memory that was filled while
loading in a process of its own (RssAnon, which leaves out mapped files). That every weight comes back bit for bit, and
that the matrices shrink as promised, holds or the script fails.

    python checkpoint.py                          # 103 M weights in blocks, 0.25 GB
    python checkpoint.py --hidden 256 --layers 2  # seconds
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, convert
from optimum_dsa.checkpoint.shards import find_shards, packed_headers
from optimum_dsa.packed.bitmask import pack, unpack


MB = 2**20
LIMITS = {0.5: 0.57, 0.6: 0.47, 0.7: 0.37}  # of the dense bytes of pruned matrices, in bf16
SPEED = 300e6  # weights per second and thread


def check(holds: bool, wrong: str) -> None:
    if not holds:
        raise AssertionError(wrong)


def best(action, *arguments, repeats: int = 7, clock=time.thread_time):
    """The action's result, and its shortest time in seconds: by default of this thread, whoever else is at work."""
    shortest = float("inf")
    for _ in range(repeats):
        start = clock()
        result = action(*arguments)
        shortest = min(shortest, clock() - start)
    return result, shortest


def speeds(rows: int, columns: int) -> None:
    print(f"\none thread, one matrix of {rows} x {columns} in memory, time of the thread, best of 7:")
    print(f"{'type':<10}{'sparsity':>9}{'pack':>12}{'unpack':>12}   M weights/s")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for sparsity in LIMITS:
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(rows, columns, generator=generator).to(dtype)
            weights.masked_fill_(torch.rand(rows, columns, generator=generator) < sparsity, 0)
            packed, packing = best(pack, weights)
            again, unpacking = best(unpack, packed)
            check(torch.equal(again, weights), f"{dtype} at {sparsity} does not come back.")
            both = [weights.numel() / seconds / 1e6 for seconds in (packing, unpacking)]
            below = "  below 300" if min(both) * 1e6 < SPEED else ""
            print(f"{str(dtype)[6:]:<10}{sparsity:>9.0%}{both[0]:>12,.0f}{both[1]:>12,.0f}{below}")


def matrix_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of the packed tensors in a folder, and what they are when dense."""
    packed = dense = 0
    for file in find_shards(folder).files:
        for header in packed_headers(folder / file).values():
            packed += header.bytes
            dense += header.size * header.dtype.itemsize
    return packed, dense


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def filled() -> int:
    """Bytes of memory that this process has filled, mapped files left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: str | Path) -> dict:
    """Load the checkpoint in `folder`: seconds, bytes filled at the peak, bytes of all weights and of the largest."""
    # what is imported is no part of what loading takes
    import transformers.models.llama.modeling_llama  # noqa: F401

    before, peak, done = filled(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], filled())
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "peak": peak[0] - before, "weights": weights, "largest": largest}


def measure_in_new_process(folder: Path) -> dict:
    command = [sys.executable, __file__, "--child", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    check(done.returncode == 0, done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def same(one: Path, other: Path) -> bool:
    first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, other))
    return all(torch.equal(value.view(torch.int16), second[name].view(torch.int16)) for name, value in first.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 64 (default: 1024)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--matrix", type=int, default=4096, help="rows and columns for the speeds (default: 4096)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        return print(json.dumps(measure(args.child)))
    shape = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 11 // 4, "num_hidden_layers": args.layers}
    config = LlamaConfig(**shape, num_attention_heads=args.hidden // 64, vocab_size=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    pruner = DSAPruner(LlamaForCausalLM(config).bfloat16())
    print(
        f"{'sparsity':<9}{'matrices':>10}{'at most':>9}{'whole file':>12}{'dense MB':>10}{'MB':>7}   convert, and back"
    )
    with tempfile.TemporaryDirectory() as folder:
        dense, there, back = (Path(folder, name) for name in ("dense", "compressed", "again"))
        for sparsity, limit in LIMITS.items():  # zeros only grow, so one model serves all
            pruner.prune(None, DSAConfig(sparsity, "magnitude", "uniform"))
            pruner.save_pretrained(dense, max_shard_size="100MB")
            _, packing = best(convert, dense, there, "compressed", repeats=1, clock=time.perf_counter)
            _, unpacking = best(convert, there, back, "dense", repeats=1, clock=time.perf_counter)
            packed, before = matrix_bytes(there)
            check(packed <= limit * before, f"{packed / before:.3f} of the bytes at {sparsity}: more than {limit}.")
            check(same(dense, there) and same(dense, back), f"weights changed at {sparsity}.")
            whole, smaller = file_bytes(dense), file_bytes(there)
            print(
                f"{sparsity:<9.0%}{packed / before:>10.1%}{limit:>9.0%}{smaller / whole:>12.1%}{whole / MB:>10.0f}"
                f"{smaller / MB:>7.0f}   {packing:.1f} s, {unpacking:.1f} s"
            )
        print("\nloading with AutoModelForCausalLM:")
        for name, path in (("dense", dense), ("compressed", there)):
            found = measure_in_new_process(path)
            print(
                f"{name:<11}{found['seconds']:>6.1f} s   peak {found['peak'] / MB:,.0f} MB filled; the model has "
                f"{found['weights'] / MB:,.0f} MB of weights, {found['largest'] / MB:,.1f} MB the largest"
            )
    speeds(args.matrix, args.matrix)


if __name__ == "__main__":
    main()
