"""What a search finds and what it costs, beside the named allocators and simpler searches.

    table       test perplexity after the sequential prune, validation tokens, seconds: named allocators, the best
                ramp, random functions, level switches at three times the budget, `auto`
    metrics     an allocation alone, a metric alone, both together, and OptiShear's search for both, at equal tokens
    seeds       evolution against random functions at one budget, over several seeds
    space       the published space, enumerated
    candidate   time of a candidate over the time of its bare forward pass, at 4,096 tokens
    kills       a search killed at ten random moments and resumed each time, against an undisturbed one
    processes   two processes against one, with one thread each: the same trace, and how much faster

Calibration feeds statistics, validation guides every choice, test is looked at once per row, at the end. Searches keep
their traces in the output folder: run the same line again to go on.

    python search.py                                                   # the embedded model on the demo's text
    python search.py MODEL --tokens tokens.safetensors -o found --part table seeds
"""

import argparse
import json
import logging
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import (
    DSAConfig,
    SearchResult,
    SearchSpace,
    SearchTrace,
    demo_model,
    demo_texts,
    load_calibration,
    load_tokens,
    own_device,
    perplexity,
    prune,
)
from optimum_dsa.search.enumeration import enumerate_space
from optimum_dsa.search.objective import Objective
from optimum_dsa.search.problem import parse_budget
from optimum_dsa.search.realise import realise
from optimum_dsa.search.resolver import Resolver
from optimum_dsa.search.search import search


NAMED = ("uniform", "owl", "dlp", "alphapruning", "lsa", "dsa")
MAIN_PARTS = ("table", "metrics", "seeds", "space", "candidate", "kills", "processes")


class Bench:
    """The model, the three texts and the settings of one run."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = own_device()
        self.config = DSAConfig(args.sparsity, args.method, batch_size=16)
        self.texts = self._texts()
        if args.windows:
            shares = {"calibration": 1, "validation": 1, "test": 4}
            self.texts = {part: self.texts[part][: share * args.windows] for part, share in shares.items()}
        self.model = self.load()
        self.calibration = load_calibration(self.texts["calibration"], self.model)

    def load(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).to(self.device).eval()

    def _texts(self) -> dict[str, Tensor]:
        if self.args.tokens:
            return {name: tokens.long() for name, tokens in load_file(self.args.tokens).items()}
        tokenizer = AutoTokenizer.from_pretrained(self.args.model)
        parts = ("calibration", "validation", "test")
        return {part: load_tokens(demo_texts(part), tokenizer, 128, 256) for part in parts}

    def search(self, strategy: str, name: str, budget: str, seed: int = 0, windows: int | None = None, **options):
        """The result of a search whose trace lies in the output folder; it goes on where it was."""
        config = DSAConfig.from_dict(self.config.to_dict() | {"seed": seed})
        folder = self.args.output / f"{self.args.method}-{name}"
        validation = self.texts["validation"][:windows]
        return search(
            self.model, self.calibration, validation, config, strategy=strategy, budget=budget, folder=folder,
            resume=True, **options,
        )  # fmt: skip

    def test(self, allocation) -> float:
        """Test perplexity of a fresh copy of the model, pruned to `allocation`."""
        model = self.load()
        prune(model, self.calibration, DSAConfig(self.args.sparsity, self.args.method, allocation))
        return perplexity(model, self.texts["test"])


def table(bench: Bench) -> None:
    print(f"{'row':<24}{'test':>9}{'tokens':>12}{'seconds':>9}{'validation':>12}{'correlation':>13}", flush=True)
    for name in NAMED:
        start = time.perf_counter()
        value = bench.test(name)
        print(f"{name:<24}{value:>9.2f}{0:>12,}{time.perf_counter() - start:>9.0f}", flush=True)
    budget = parse_budget(bench.args.budget).tokens
    for strategy, factor in (("auto", 1), ("ramp", 1), ("random", 1), ("level_switch", 3)):
        if bench.args.strategies and strategy not in bench.args.strategies:
            continue
        result: SearchResult = bench.search(strategy, strategy, f"{factor * budget} tokens")
        spent, correlation = result.budget, result.proxy_correlation
        print(
            f"{strategy + (f' at {factor} x' if factor > 1 else ''):<24}{bench.test(result.best):>9.2f}"
            f"{spent.spent_tokens:>12,}{spent.spent_seconds:>9.0f}{result.finalists[0].loss:>12.4f}"
            f"{'' if correlation is None else f'{correlation:.2f}':>13}   {result.finalists[0].candidate}",
            flush=True,
        )


def metrics(bench: Bench) -> None:
    print(f"{'row':<24}{'test':>9}{'tokens':>12}{'seconds':>9}{'validation':>12}", flush=True)
    strategies = bench.args.strategies or ("evolution", "symbolic", "joint", "optishear")
    for strategy in strategies:
        result = bench.search(strategy, f"metrics-{strategy}", bench.args.budget, finalists=2, named=NAMED)
        best, spent = result.finalists[0], result.budget
        print(f"{strategy:<24}{bench.test(result.best):>9.2f}{spent.spent_tokens:>12,}{spent.spent_seconds:>9.0f}"
              f"{best.loss:>12.4f}   {best.candidate}", flush=True)  # fmt: skip
    for name, metric in (("wanda", None), ("pruner_zero", "pruner_zero"), ("ria", "ria")):
        if not bench.args.strategies:
            model = bench.load()
            prune(model, bench.calibration, DSAConfig(bench.args.sparsity, "wanda", "uniform", metric=metric))
            print(f"{name + ', uniform':<24}{perplexity(model, bench.texts['test']):>9.2f}", flush=True)


def seeds(bench: Bench) -> None:
    print(f"{'seed':>4}{'evolution':>12}{'random':>12}   validation loss after the sequential prune", flush=True)
    losses = {"evolution": [], "random": []}
    for seed in range(bench.args.seeds):
        for strategy, found in losses.items():
            name = f"{strategy}-{seed}"
            result = bench.search(strategy, name, bench.args.seed_budget, seed, windows=64, finalists=1, named=NAMED)
            found.append(result.finalists[0].loss)
        print(f"{seed:>4}{losses['evolution'][-1]:>12.4f}{losses['random'][-1]:>12.4f}", flush=True)
    medians = [statistics.median(found) for found in losses.values()]
    print(f"{'median':>4}{medians[0]:>10.4f}{medians[1]:>12.4f}", flush=True)


def space(bench: Bench) -> None:
    realised = realise(bench.model, bench.calibration, bench.config)
    resolver = Resolver(bench.model, realised, bench.calibration, bench.config, ())
    start = time.perf_counter()
    found = enumerate_space(SearchSpace.published(), resolver)
    print(f"{found.texts:,} texts, {found.functions:,} functions, {len(found):,} distinct allocations, "
          f"{time.perf_counter() - start:.1f} s", flush=True)  # fmt: skip


def candidate(bench: Bench) -> None:
    windows = bench.texts["validation"][: max(4096 // bench.texts["validation"].shape[1], 1)]
    realised = realise(bench.model, bench.calibration, bench.config)
    objective = Objective(bench.model, realised, windows, bench.config.batch_size)
    counts = {name: round(bench.args.sparsity * size) for name, size in realised.sizes.items()}
    objective.loss(counts, range(len(windows)))
    ratios = []
    for _ in range(9):
        start = time.perf_counter()
        with torch.no_grad():
            bench.model(input_ids=windows.to(bench.device), use_cache=False).logits.sum().item()
        middle = time.perf_counter()
        objective.loss(counts, range(len(windows)))
        ratios.append((time.perf_counter() - middle) / (middle - start))
    print(f"candidate over bare forward at {windows.numel():,} tokens: {statistics.median(ratios):.3f} "
          f"(of 9: {min(ratios):.3f} to {max(ratios):.3f})", flush=True)  # fmt: skip


def small(bench: Bench, folder: Path) -> None:
    """The search that `kills` and `processes` repeat in processes of their own."""
    windows = bench.texts["validation"][:32]
    bench.calibration = load_calibration(bench.texts["calibration"][:16], bench.model)
    start = time.perf_counter()
    result = search(
        bench.model, bench.calibration, windows, bench.config, strategy="evolution",
        budget=bench.args.small_budget, folder=folder, resume=True, finalists=1, named=NAMED,
    )  # fmt: skip
    rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    if rank == 0:
        seconds = time.perf_counter() - start
        (folder / "seconds.json").write_text(json.dumps({"whole": seconds, "trials": len(result.trace.trials)}))


def child(bench: Bench, folder: Path, budget: str, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    arguments = [*(launcher if processes > 1 else ()), __file__, str(bench.args.model), "--small", str(folder)]
    arguments += ["--small-budget", budget, "--threads", "1", "--method", bench.args.method]
    if bench.args.tokens:
        arguments += ["--tokens", str(bench.args.tokens)]
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def trials(folder: Path) -> list[dict]:
    found = SearchTrace.load(folder / "trace.jsonl").trials
    return [{k: v for k, v in json.loads(trial.to_json()).items() if k != "seconds"} for trial in found]


def kills(bench: Bench) -> None:
    whole, killed = bench.args.output / "small-whole", bench.args.output / "small-killed"
    budget = bench.args.small_budget
    assert child(bench, whole, budget).wait() == 0
    rng, lines = random.Random(0), len(trials(whole))
    moments = sorted(rng.sample(range(1, lines), 10))
    for moment in moments:
        process = child(bench, killed, budget)
        path = killed / "trace.jsonl"
        while process.poll() is None and (not path.exists() or path.read_text().count("\n") <= moment):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert child(bench, killed, budget).wait() == 0
    results = [(folder / "allocation.json").read_text() for folder in (whole, killed)]
    print(f"killed after {moments} of {lines} trials: same trials {trials(killed) == trials(whole)}, "
          f"same result {results[0] == results[1]}", flush=True)  # fmt: skip


def processes(bench: Bench) -> None:
    folders = {count: bench.args.output / f"small-{count}" for count in (1, 2)}
    for count, folder in folders.items():
        assert child(bench, folder, bench.args.processes_budget, count).wait() == 0
    one, two = (json.loads((folder / "seconds.json").read_text()) for folder in folders.values())
    print(f"two processes: same trace {trials(folders[1]) == trials(folders[2])}, {one['whole']:.1f} s against "
          f"{two['whole']:.1f} s, {one['whole'] / two['whole']:.2f} times as fast", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=demo_model())
    parser.add_argument("--tokens", type=Path, help="safetensors file with calibration, validation and test")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/search-benchmark"))
    parser.add_argument("-s", "--sparsity", type=float, default=0.7)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--budget", default="2M tokens", help="of every search in the table (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed-budget", default="400k tokens", help="of every search of `seeds`")
    parser.add_argument("--small-budget", default="150k tokens", help="of the searches of `kills`")
    parser.add_argument("--processes-budget", default="600k tokens", help="of the searches of `processes`")
    parser.add_argument("--part", nargs="+", choices=MAIN_PARTS, default=MAIN_PARTS)
    parser.add_argument("--strategies", nargs="+", help="rows of the table that are searches (default: all)")
    parser.add_argument("--windows", type=int, help="of calibration and validation, and four times as many of test")
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--small", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("optimum_dsa").setLevel(logging.ERROR)
    bench = Bench(args)
    if args.small:
        small(bench, args.small)
        return
    for part in args.part:
        globals()[part](bench)


if __name__ == "__main__":
    main()
