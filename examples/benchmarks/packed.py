"""What multiplying with matrices without their zeros gains, layer by layer, as a table.

    python examples/benchmarks/packed.py --shapes 4096x4096 --sparsity 0.5 0.6 --threads 1 2 --batch 1 8

Kernels and dense products take turns in one process, each call on another copy, so that weights come from memory as
they do in decoding. A number is how many times as fast as torch's bfloat16 product, in processor time, which a shared
machine distorts less than time on the clock: the median, and the quartiles of single rounds. `dense` is the best loop
of our own over a dense matrix (`dense.cpp`, AVX-512 only); `read` is the share of the measured bandwidth of reading
that the packed product reaches.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path


# Before torch: threads that wait do not count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from optimum_dsa.packed.kernels.compiling import compiler  # noqa: E402
from optimum_dsa.packed.loading import load, use  # noqa: E402
from optimum_dsa.packed.matrix import PackedMatrix, row_starts  # noqa: E402


SHAPES = ("576x1536", "2048x8192", "4096x4096", "4096x14336")
CALL = 16 * 2**20  # weights that are multiplied with in one sample; small matrices several times


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def dense_library() -> ctypes.CDLL | None:
    """The dense loop, where this processor can run it."""
    if "avx512_bf16" not in load().runnable:
        return None
    made = Path(tempfile.mkdtemp()) / "dense.so"
    source = Path(__file__).with_name("dense.cpp")
    options = ["-O3", "-std=c++20", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w"]
    subprocess.run([compiler(), *options, str(source), "-o", str(made)], check=True)
    return ctypes.CDLL(str(made))


def with_numbers(packed: PackedMatrix, bits: int) -> PackedMatrix:
    """A matrix of the same mask with whole numbers, a scale a row: what they are makes no difference to the time."""
    rows, columns = packed.shape
    starts = row_starts(packed.mask, packed.shape, even=bits == 4)
    kind, bound = {8: (torch.int8, 127), 4: (torch.uint8, 255)}[bits]
    size = int(starts[-1]) // (2 if bits == 4 else 1)
    values = torch.randint(0, bound, (size,)).to(kind)
    return PackedMatrix(packed.mask, values, starts, packed.shape, torch.full((rows, 1), 0.01))


class Layer:
    """Copies of one layer, and what multiplies with them: name -> function of which copy."""

    def __init__(self, shape: str, sparsity: float, names: list[str], cold: int):
        self.rows, self.columns = map(int, shape.split("x"))
        self.copies = max(2, min(-(-cold // (2 * self.rows * self.columns)), 64))
        self.dense, self.packed, self.names = [], {"": [], "int8": [], "int4": []}, names
        for _ in range(self.copies):
            weight = torch.randn(self.rows, self.columns, dtype=torch.bfloat16) * 0.02
            weight[torch.rand(weight.shape) < sparsity] = 0
            self.dense.append(weight)
            self.packed[""].append(PackedMatrix.of(weight))
            for bits in (8, 4):
                self.packed[f"int{bits}"].append(with_numbers(self.packed[""][-1], bits))

    def products(self, inputs: torch.Tensor, library: ctypes.CDLL | None, threads: int):
        yield "torch", lambda i: linear(inputs, self.dense[i])
        batch = len(inputs)
        if library is not None and batch in (1, 4, 8) and self.columns % 128 == 0:
            out = torch.empty(batch, self.rows)
            sizes = (*map(ctypes.c_int64, (batch, self.rows, self.columns)), threads)
            yield (
                "dense",
                lambda i: library.dense(
                    *(ctypes.c_void_p(t.data_ptr()) for t in (self.dense[i], inputs, out)), *sizes
                ),
            )
        for name in self.names:
            for kind, matrices in self.packed.items():
                if not kind or name == self.names[0]:

                    def product(i, matrices=matrices):
                        return matrices[i].linear(inputs)

                    product.instructions = name
                    yield f"{name} {kind}".strip(), product


def sampled(products: dict, copies: int, calls: int, rounds: int) -> dict[str, list[float]]:
    """Name -> processor seconds of one call, of every round; names take turns, each on copies that are cold."""
    times, turn = {name: [] for name in products}, 0
    for _ in range(rounds):
        for name, product in products.items():
            if hasattr(product, "instructions"):
                use(product.instructions)
            turn += 1
            start = time.process_time()
            for call in range(calls):
                product((turn + call) % copies)
            times[name].append((time.process_time() - start) / calls)
            turn += calls
    return times


def bandwidth(library: ctypes.CDLL, threads: int) -> float:
    """Bytes a second of one thread's reading, median of 15."""
    data, found = torch.ones(256 * 2**20, dtype=torch.uint8), []
    library.read_all.restype = ctypes.c_int64
    for _ in range(15):
        start = time.process_time()
        library.read_all(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(len(data)), threads)
        found.append(len(data) / (time.process_time() - start))
    return statistics.median(found)


def row_of(layer: Layer, batch: int, threads: int, library: ctypes.CDLL | None, args, speed: float) -> str:
    inputs = torch.randn(batch, layer.columns, dtype=torch.bfloat16)
    products = dict(layer.products(inputs, library, threads))
    calls = max(1, CALL // (layer.rows * layer.columns))
    with torch.inference_mode():
        sampled(products, layer.copies, 1, 2)
        times = sampled(products, layer.copies, calls, args.rounds)
    shown = []
    for name in list(times)[1:]:
        ratios = sorted(a / b for a, b in zip(times["torch"], times[name]))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        shown.append(f"{name} {statistics.median(ratios):.2f} [{low:.2f}-{high:.2f}]")
    best = statistics.median(times[layer.names[0]])
    if speed:
        shown.append(f"read {layer.packed[''][0].nbytes / best / speed:.2f}")
    return f"batch {batch}, threads {threads}: torch {statistics.median(times['torch']) * 1e3:.2f} ms; " + ", ".join(
        shown
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8, 16, 64])
    parser.add_argument("--kernels", nargs="+", help="instruction sets; default: the best one, and avx2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", type=int, default=200, help="MB of dense weights between two uses of one copy")
    args = parser.parse_args(argv)
    found = load(compile=True)
    names = args.kernels or [name for name in found.runnable if name in (found.runnable[0], "avx2")] or ["reference"]
    library = dense_library()
    print(f"{machine()}; {found.name} ({found.reason})", flush=True)
    torch.manual_seed(0)
    speeds = {}
    for threads in args.threads if library else []:
        speeds[threads] = bandwidth(library, threads)
        print(f"reading, {threads} threads: {speeds[threads] / 1e9:.1f} GB a second of processor time", flush=True)
    for shape in args.shapes:
        for sparsity in args.sparsity:
            layer = Layer(shape, sparsity, names, args.cold * 10**6)
            share = layer.packed[""][0].nbytes / layer.dense[0].nbytes
            print(f"{shape}, {sparsity:.0%} zeros, {share:.3f} of the bytes", flush=True)
            for threads in args.threads:
                torch.set_num_threads(threads)
                for batch in args.batch:
                    print("  " + row_of(layer, batch, threads, library, args, speeds.get(threads, 0)), flush=True)


if __name__ == "__main__":
    main()
