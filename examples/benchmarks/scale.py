"""A plan on paper for pruning a model on many GPUs: operations, bytes, and the time that they take at given speeds.

Who prunes which matrix is asked of the package itself; the rest is arithmetic on the shape of a Llama. Speeds of one
GPU are fitted to times that `gpu.py` measured on one (two shapes, two methods); those of links are assumed, as is
that nothing overlaps: a block's phases come one after the other.

    python scale.py                                             # 70 billion parameters, sparsegpt, 8 nodes of 8 GPUs
    python scale.py --gpus 1 8 64 --samples 128 --length 2048
"""

import argparse
import math
from dataclasses import dataclass

from optimum_dsa.common.ranks import Ranks
from optimum_dsa.model.architecture import Weight
from optimum_dsa.model.walked import Group
from optimum_dsa.pruning.owners import owners
from optimum_dsa.pruning.planning.work import OPERATIONS


@dataclass(frozen=True)
class Shape:
    """A Llama: hidden and intermediate size, rows of k and v, blocks."""

    hidden: int
    inner: int
    narrow: int
    blocks: int

    def groups(self) -> list[list[tuple[str, int, int]]]:
        """Matrices that share an input: name, rows, columns."""
        h, i, n = self.hidden, self.inner, self.narrow
        return [
            [("q", h, h), ("k", n, h), ("v", n, h)],
            [("o", h, h)],
            [("gate", i, h), ("up", i, h)],
            [("down", h, i)],
        ]

    @property
    def weights(self) -> int:
        return sum(rows * columns for group in self.groups() for _, rows, columns in group)

    @property
    def sums(self) -> int:
        """Entries of all X·Xᵀs of a block."""
        return sum(group[0][2] ** 2 for group in self.groups())

    def forward(self, tokens: int, length: int) -> float:
        """Operations of one forward pass of a block."""
        return 2.0 * self.weights * tokens + 4.0 * tokens * length * self.hidden

    def summing(self, tokens: int) -> float:
        """Operations of X·Xᵀ of all inputs of a block."""
        return 2.0 * self.sums * tokens

    def updates(self, ranks: Ranks) -> float:
        """Operations of the process that has most to do when `ranks` divide the updates of a block."""
        groups = [
            Group(tuple(Weight(name, name, "weight", (rows, columns)) for name, rows, columns in group), {})
            for group in self.groups()
        ]
        matrix, factor = OPERATIONS["sparsegpt"]
        loads, begun = [0.0] * ranks.count, set()
        found = owners(groups, ranks, True)
        for number, group in enumerate(groups):
            for weight in group.weights:
                rank, (rows, columns) = found[weight.name], weight.shape
                loads[rank] += matrix * rows * columns**2 + factor * columns**3 * ((rank, number) not in begun)
                begun.add((rank, number))
        return max(loads)


MODELS = {
    "8B": Shape(4096, 14336, 1024, 32),
    "70B": Shape(8192, 28672, 1024, 80),
    "405B": Shape(16384, 53248, 1024, 126),
}


@dataclass(frozen=True)
class Speeds:
    """Operations a second of one GPU in forward passes, in X·Xᵀ and in updates; bytes a second that each can move.

    Those of links are assumed: `within` a node, `between` nodes, and to `load` weights from its host.
    """

    forward: float
    summing: float
    update: float
    within: float = 300e9
    between: float = 40e9
    load: float = 20e9


def fitted() -> Speeds:
    """Speeds of one H200, from what `gpu.py` took on it for 128 windows of 2048 tokens: forward, wanda, sparsegpt.

    X·Xᵀ is taken to run as fast as a forward pass: both are products of bfloat16 with sums in float32.
    """
    tokens, length = 128 * 2048, 2048
    rows = ((Shape(2048, 8192, 512, 16), 1.34, 3.33, 5.64), (Shape(4096, 14336, 1024, 4), 0.95, 1.99, 3.64))
    forward = min(shape.blocks * shape.forward(tokens, length) / bare for shape, bare, _, _ in rows)
    update = min(
        shape.blocks * shape.updates(Ranks()) / (sparsegpt - wanda - shape.blocks * shape.summing(tokens) / forward)
        for shape, _, wanda, sparsegpt in rows
    )
    return Speeds(forward, forward, update)


def plan(shape: Shape, gpus: int, samples: int, length: int, batch: int, speeds: Speeds) -> dict[str, float]:
    """Seconds of a prune by phase, of all blocks."""
    per_node = 8
    ranks = Ranks(0, gpus)
    batches = math.ceil(samples / batch)
    rounds = math.ceil(batches / gpus)
    tokens = rounds * batch * length  # of whoever has most
    link = speeds.within if gpus <= per_node else speeds.between
    share = (gpus - 1) / gpus
    # Two passes to prune, and one to allocate.
    found = {
        "forward": 3 * shape.forward(tokens, length) / speeds.forward,
        "X·Xᵀ": shape.summing(tokens) / speeds.summing,
        "adding X·Xᵀ": (rounds + 1) * 4 * shape.sums * share / link,
        "updates": shape.updates(ranks) / speeds.update,
        "sending weights": 2 * shape.weights * share / link,
        "loading blocks": 2 * 2 * shape.weights / speeds.load,
    }
    return {name: shape.blocks * seconds for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="70B")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2)
    args = parser.parse_args()
    shape, speeds = MODELS[args.model], fitted()
    tokens = args.samples * args.length
    print(
        f"speeds of one GPU: forward {speeds.forward / 1e12:.0f} TFLOP/s, X·Xᵀ {speeds.summing / 1e12:.0f}, ", end=""
    )
    print(f"updates {speeds.update / 1e12:.0f}")
    print(f"{args.model}: {shape.blocks} blocks of {shape.weights / 1e6:.0f}M weights, {tokens:,} tokens")
    print(f"forward passes {3 * shape.blocks * shape.forward(tokens, args.length) / 1e18:.2f} EFLOP, ", end="")
    print(f"X·Xᵀ {shape.blocks * shape.summing(tokens) / 1e18:.2f}, ", end="")
    print(f"updates {shape.blocks * shape.updates(Ranks()) / 1e18:.3f}; ", end="")
    print(f"X·Xᵀs of a block {4 * shape.sums / 1e9:.1f} GB, its weights {2 * shape.weights / 1e9:.1f} GB")
    plans = {gpus: plan(shape, gpus, args.samples, args.length, args.batch_size, speeds) for gpus in args.gpus}
    print("".join(f"{name:>18}" for name in ("seconds", *(f"{gpus} GPUs" for gpus in plans))))
    for name in next(iter(plans.values())):
        print(f"{name:>18}" + "".join(f"{found[name]:18.0f}" for found in plans.values()))
    print(f"{'all':>18}" + "".join(f"{sum(found.values()):18.0f}" for found in plans.values()))


if __name__ == "__main__":
    main()
