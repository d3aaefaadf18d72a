"""What pruning costs beyond the forward passes that it cannot do without: time and memory.

Time: the seconds of `prune` over the seconds of the bare block forwards that the method needs: the blocks called one
after the other on the same batches, without hooks. Wanda and SparseGPT need two forwards of every block (one to
collect, one to hand on) but one of the last; an allocation that reads scores needs one more of every block; magnitude
needs none and is held against wanda's. With the dense model's targets one more is needed, of the dense block; that
true sequence runs parts of a block again counts as cost. `prune` and its forwards take turns, and the median ratio is
printed.

Memory: in a process of its own per case, the peak resident memory of `prune` over what was resident before (model and
tokens), less the activations: the hidden states of all samples at one block boundary, and what the bare forward of one
batch through one block takes on top. Beside it stands what was set as its bound: of the block for which it is
highest, three times the weights in float32 and the X·Xᵀs (two of each with dense targets), and the activations once
more. glibc is told to hand freed memory back at once, so that resident means in use, and a copy of the model is pruned
on one sequence first, so that code is loaded and does not count.

    python one_shot.py                                             # the embedded model on the demo's text
    python one_shot.py MODEL --tokens tokens.safetensors --repeats 3
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import (
    DSAConfig,
    UpdateConfig,
    capture_calls,
    demo_model,
    demo_texts,
    find_architecture,
    load_tokens,
    prune,
)


# method, allocation or targets, forwards of every block (but one less of the last)
CASES = [
    ("magnitude", "uniform", 2),
    ("wanda", "uniform", 2),
    ("wanda", "dsa", 3),
    ("wanda", "owl", 3),
    ("sparsegpt", "uniform", 2),
    ("alps", "uniform", 2),
    ("alps", "dense", 3),
]
MB = 2**20


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, Tensor]:
    """The model and `samples` x `length` tokens."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # memory of its own, not pages of the checkpoint
    if args.tokens:
        with safe_open(args.tokens, "pt") as file:
            tokens = file.get_slice("calibration")[: args.samples, : args.length].long()
    else:
        tokens = load_tokens(
            demo_texts("calibration"),
            AutoTokenizer.from_pretrained(args.model),
            num_samples=args.samples,
            sequence_length=args.length,
        )
    if tokens.shape != (args.samples, args.length):
        raise SystemExit(f"{args.samples} x {args.length} tokens were asked for, and there are {tuple(tokens.shape)}.")
    return model, tokens


def configured(method: str, allocation: str, batch_size: int) -> DSAConfig:
    """A case at 50 %; the allocation "dense" is uniform, with the dense model's targets in true sequence."""
    dense = UpdateConfig(targets="dense", true_sequential=True, residual=True)
    settings = {"allocation": "uniform", "update": dense} if allocation == "dense" else {"allocation": allocation}
    return DSAConfig(0.5, method, batch_size=batch_size, **settings)


def bound(model: torch.nn.Module, allocation: str) -> int:
    """Bytes beyond the model and its activations that updates of single weights may take."""
    of_blocks = []
    for block in find_architecture(model).blocks:
        inputs = {(*weight.module.split(".")[:-1], weight.shape[1]): weight.shape[1] for weight in block.weights}
        squares = sum(columns**2 for columns in inputs.values())
        of_blocks.append(3 * sum(weight.size for weight in block.weights) + squares * (1 + (allocation == "dense")))
    return 4 * max(of_blocks)


class Bare:
    """The blocks of a model and the arguments they are called with."""

    def __init__(self, model: torch.nn.Module, tokens: Tensor, batch_size: int):
        (stack,) = find_architecture(model).stacks
        self.calls = capture_calls(model, stack, [{"input_ids": part} for part in tokens.split(batch_size)])
        self.blocks = [model.get_submodule(block.name) for block in stack.blocks]
        self.start = list(self.calls.hidden)

    @torch.no_grad()
    def seconds(self, forwards: int) -> float:
        """Time of that many forwards of every block on every batch, and of one less of the last block."""
        self.calls.hidden = list(self.start)
        start = time.perf_counter()
        for index, block in enumerate(self.blocks):
            for number in range(len(self.calls)):
                for _ in range(forwards - (block is self.blocks[-1])):
                    output = self.calls.run(block, index, number)
                self.calls.hidden[number] = output
        return time.perf_counter() - start

    @torch.no_grad()
    def activations(self) -> int:
        """Bytes of the hidden states of all samples, and of what one block makes of one batch."""
        self.seconds(2)  # first calls load code and start threads
        self.calls.hidden = list(self.start)
        return sum(part.nbytes for part in self.start) + peak(lambda: self.calls.run(self.blocks[0], 0, 0))


def measure_time(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Per case, the median seconds of `prune`, and the median of its ratio to the bare forwards beside it."""
    model, tokens = load(args)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    bare = Bare(model, tokens, args.batch_size)
    bare.seconds(2)
    measured = [[] for _ in CASES]
    for _ in range(args.repeats):
        for results, (method, allocation, forwards) in zip(measured, CASES):
            before = bare.seconds(forwards)
            seconds = prune(model, tokens, configured(method, allocation, args.batch_size)).seconds
            model.load_state_dict(dense)
            after = bare.seconds(forwards)
            results.append((seconds, 2 * seconds / (before + after)))
    return [tuple(map(statistics.median, zip(*results))) for results in measured]


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def peak(work) -> int:
    """Bytes that `work` takes beyond what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def measure_memory(args: argparse.Namespace, method: str, allocation: str) -> dict[str, int]:
    """Bytes of the model, of the activations, and that `prune` takes beyond what was there."""
    model, tokens = load(args)
    activations = Bare(model, tokens, args.batch_size).activations()
    config = configured(method, allocation, args.batch_size)
    prune(copy.deepcopy(model), tokens[:1], config)
    taken = peak(lambda: prune(model, tokens, config))
    size = sum(parameter.nbytes for parameter in model.parameters())
    activations = 0 if method == "magnitude" else activations
    return {
        "model": size,
        "activations": activations,
        "taken": taken,
        "bound": bound(model, allocation) + activations,
    }


def memory_of(args: argparse.Namespace, method: str, allocation: str) -> dict[str, int]:
    """`measure_memory` in a fresh process."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *sys.argv[1:], "--case", f"{method},{allocation}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default=demo_model(), help="a folder or Hub id (default: the embedded one)"
    )
    parser.add_argument("--tokens", help="safetensors file with `calibration`, (samples, length); default: demo text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure_memory(args, *args.case.split(","))))
        return
    times = measure_time(args)
    print(f"{args.samples} x {args.length} tokens, {args.dtype}, {torch.get_num_threads()} threads")
    print(
        f"{'':<22}{'seconds':>9}{'ratio':>7}{'model':>9}{'activations':>13}{'extra':>9}{'bound':>9}{'extra/model':>13}"
    )
    for (method, allocation, *_), (seconds, ratio) in zip(CASES, times):
        memory = memory_of(args, method, allocation)
        extra = memory["taken"] - memory["activations"]
        print(
            f"{method + ' / ' + allocation:<22}{seconds:>9.2f}{ratio:>7.2f}{memory['model'] / MB:>6.1f} MB"
            f"{memory['activations'] / MB:>10.1f} MB{extra / MB:>6.1f} MB{memory['bound'] / MB:>6.1f} MB"
            f"{extra / memory['model']:>13.0%}"
        )


if __name__ == "__main__":
    main()
