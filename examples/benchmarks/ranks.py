"""What several processes make of a prune: the same bits, and how much faster.

For every method and number of processes torchrun starts so many, with one thread each, and in turn the first prunes
alone, while the others wait, and all prune together. Printed are the medians of both times and of their ratio; the
same ratio of processor time (of the first alone over the most that one process needs together), which other work on
the machine hardly changes; the shares of the time in which processes waited for each other and moved tensors; and
whether weights and masks are those of the first of all prunes, to the last bit.

    python ranks.py                                             # the embedded model on the demo's text
    python ranks.py MODEL --tokens tokens.safetensors --processes 2 3 --repeats 3
    python ranks.py --constants                                 # and what a plan for more processes is made from
"""

import argparse
import copy
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import DSAConfig, demo_model, demo_texts, find_architecture, load_tokens, prune
from optimum_dsa.common.ranks import ALONE, Ranks, current_ranks
from optimum_dsa.model.statistics import LayerStatistics


def calibration(args: argparse.Namespace) -> Tensor:
    """Token ids, (samples, length)."""
    if args.tokens:
        with safe_open(args.tokens, "pt") as file:
            return file.get_tensor("calibration")[: args.samples].long()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return load_tokens(demo_texts("calibration"), tokenizer, sequence_length=128, num_samples=args.samples)


def digests(model: torch.nn.Module) -> list[str]:
    """SHA-256 of all parameters, and of which weights are zero."""
    whole, masks = hashlib.sha256(), hashlib.sha256()
    for parameter in model.parameters():
        whole.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for weight in find_architecture(model).weights:
        masks.update((weight.tensor(model) == 0).cpu().numpy().tobytes())
    return [whole.hexdigest(), masks.hexdigest()]


class Clock:
    """Seconds that `Ranks` takes for moving tensors, and for waiting until all are there."""

    def __init__(self, ranks: Ranks):
        self.seconds = {"waiting": 0.0, "moving": 0.0}
        for name in ("gather", "broadcast_", "gather_flat", "scatter", "joined"):
            setattr(ranks, name, self._timed(getattr(ranks, name), "waiting" if name == "gather" else "moving"))

    def _timed(self, call, kind):
        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[kind] += time.perf_counter() - began

        return timed


def worker(args: argparse.Namespace) -> None:
    """One of the processes: prunes alone and together in turn, and leaves what it saw in the folder."""
    ranks = current_ranks()
    clock = Clock(ranks)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokens, rows = calibration(args), []
    for method in args.methods:
        config = DSAConfig(args.sparsity, method, args.allocation, batch_size=args.batch_size)
        for _ in range(args.repeats):
            row = {"method": method}
            for name, together in (("alone", ALONE), ("together", ranks)):
                model = copy.deepcopy(dense)
                ranks.gather()  # all begin at once
                clock.seconds = dict.fromkeys(clock.seconds, 0.0)
                began, work = time.perf_counter(), time.process_time()
                if together is ranks or ranks.is_first:
                    prune(model, tokens, config, ranks=together)
                    row[name], row[f"{name} work"] = time.perf_counter() - began, time.process_time() - work
                    row[f"{name} digests"] = digests(model)
            rows.append({**row, **clock.seconds})
    (Path(args.folder) / f"{ranks.index}.json").write_text(json.dumps(rows))


def launch(args: argparse.Namespace, processes: int) -> list[list[dict]]:
    """What each of so many processes saw."""
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        subprocess.run([*start, *sys.argv, "--folder", folder], check=True, env=environment)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def report(args: argparse.Namespace) -> None:
    """Print a row for every method and number of processes."""
    known: dict[str, list[str]] = {}
    head = ("method", "processes", "alone s", "together s", "ratio", "work ratio", "waiting", "moving", "bits")
    print("".join(f"{name:>12}" for name in head))
    for processes in args.processes:
        found = launch(args, processes)
        for method in args.methods:
            rows = [[row for row in rank if row["method"] == method] for rank in found]
            first = known.setdefault(method, rows[0][0]["alone digests"])
            every = [row[key] for rank in rows for row in rank for key in row if key.endswith("digests")]
            alone, together = ([row[name] for row in rows[0]] for name in ("alone", "together"))
            ratio = statistics.median(one / all_ for one, all_ in zip(alone, together))
            most = [max(row["together work"] for row in each) for each in zip(*rows)]
            work = statistics.median(row["alone work"] / each for row, each in zip(rows[0], most))
            shares = [
                statistics.mean(row[kind] / row["together"] for rank in rows for row in rank)
                for kind in ("waiting", "moving")
            ]
            times = [f"{statistics.median(each):.2f}" for each in (alone, together)]
            same = "the same" if all(each == first for each in every) else "DIFFERENT"
            cells = (
                method,
                processes,
                *times,
                f"{ratio:.2f}",
                f"{work:.2f}",
                *(f"{share:.0%}" for share in shares),
                same,
            )
            print("".join(f"{cell!s:>12}" for cell in cells), flush=True)


def constants() -> None:
    """Print how fast this process makes sums of inputs, multiplies, and adds: what a plan is made from."""
    torch.set_num_threads(1)
    rows, columns = 4096, 1024
    inputs = torch.randn(rows, columns)

    def timed(call, repeats: int = 5) -> float:
        call()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    product = timed(lambda: inputs @ inputs[:columns].t())
    print(f"product of float32: {2 * rows * columns**2 / product / 1e9:.1f} GFLOP/s")
    for gram in (False, True):
        seconds = timed(lambda gram=gram: LayerStatistics(columns, with_gram=gram).update_(inputs))
        work = 2 * rows * columns * (columns if gram else 1)
        print(f"{'X·Xᵀ' if gram else 'Σ x²'}: {work / seconds / 1e9:.1f} GFLOP/s")
    total, more = torch.zeros(columns, columns), torch.ones(columns, columns)
    print(f"adding sums: {12 * total.numel() / timed(lambda: total.add_(more)) / 1e9:.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(demo_model()))
    parser.add_argument("--tokens", help="a safetensors file with the tensor 'calibration', (samples, length)")
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--allocation", default="dsa")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--constants", action="store_true", help="print what a plan for more processes is made from")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        worker(args)
    elif args.constants:
        constants()
    else:
        report(args)


if __name__ == "__main__":
    main()
