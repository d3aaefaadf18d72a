"""The embedded model: a small Llama trained on the text that every CPython carries, and what to try with it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from ..common.output import OutputFolder
from ..data import load_tokens
from ..evaluation.perplexity import perplexity
from ..pruner import DSAPruner
from ..pruning.allocation import Allocation
from ..pruning.allocation.layout import by_block
from ..pruning.calibration import load_calibration
from ..pruning.configuration import DSAConfig
from ..search.problem import parse_budget
from ..search.search import search
from ..sharing.tables import block_bars


LENGTH = 256
SAMPLES = 64  # of calibration: 16k tokens, which fewer seconds read than say more
NAMED = ("uniform", "owl", "dsa")
DISCOVERED = "discovered"
VALIDATION = 32  # windows that the search compares on
BUDGET = "150k tokens"  # where the search was stopped, for its time; chosen by the loss on validation text


def demo_model() -> Path:
    """The folder of the embedded model: inside the installed package, or `examples/` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "tiny_llama", package.parent / "examples" / "tiny-llama"):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError("The embedded model is missing: install optimum-dsa from a wheel or a whole checkout.")


def demo_texts(part: str) -> list[str]:
    """The standard library's modules that training held out for "calibration", "validation" or "test"."""
    held_out = json.loads((demo_model() / "training.json").read_text(encoding="utf-8"))["held_out"][part]
    library = Path(os.__file__).parent
    return [(library / name).read_text(encoding="utf-8") for name in held_out if (library / name).is_file()]


@dataclass(frozen=True)
class DemoRow:
    """A model of the demo: what it was pruned by, its perplexity on the test text, the share removed, its seconds.

    `blocks` is the share removed from each block.
    """

    name: str
    perplexity: float
    sparsity: float = 0.0
    seconds: float | None = None
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        return f"{self.name:<12}{self.perplexity:>12.2f}{self.sparsity:>12.4f}{seconds:>10}"


def run_demo(
    output: str,
    sparsity: float = 0.6,
    method: str = "wanda",
    say: Callable[[str], None] = print,
    budget: str = BUDGET,
) -> dict[str, Any]:
    """Prune the embedded model by named allocations and by one that a search finds; the rows of their comparison.

    Args:
        output (`str`): folder for the model that was pruned as the search found.
        sparsity (`float`, defaults to 0.6): share of the weights of its blocks to remove.
        method (`str`, defaults to `"wanda"`): a row of `METHODS`.
        say (`Callable[[str], None]`): is given what the command prints, line by line.
        budget (`str`, defaults to `"150k tokens"`): of the search.
    """
    config = DSAConfig(sparsity, method)
    parse_budget(budget)
    with OutputFolder(output) as place, _one_thread():
        rows = _compare(place, config, budget, say)
    say("  optimum-cli dsa prune Qwen/Qwen3-0.6B -o qwen3-60 --sparsity 0.6     (downloads model and text)")
    say("  optimum-cli dsa search --help     (finds an allocation for a model of yours)")
    return {"rows": [asdict(row) for row in rows], "output": str(place.shown)}


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside, and as many as before afterwards."""
    # products of this size gain little from threads, and lose much to waiting where another process has a core
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(output: OutputFolder, config: DSAConfig, budget: str, say: Callable[[str], None]) -> list[DemoRow]:
    folder = demo_model()
    dense = DSAPruner.from_pretrained(folder)
    texts = {
        part: load_tokens(demo_texts(part), dense.tokenizer, sequence_length=LENGTH) for part in ("validation", "test")
    }
    calibration = load_tokens(demo_texts("calibration"), dense.tokenizer, num_samples=SAMPLES, sequence_length=LENGTH)
    test = texts["test"][:64]
    size = sum(parameter.numel() for parameter in dense.model.parameters())
    say(
        f"A Llama of {size / 1e6:.1f} M parameters; {config.method} removes {config.sparsity:.0%} of the weights in "
        "its blocks. Perplexity (lower is\n"
        f"better) on {test.numel():,} tokens that nothing else has seen; calibration reads {calibration.numel():,}.\n"
    )
    say(f"{'allocation':<12}{'perplexity':>12}{'sparsity':>12}{'seconds':>10}")
    rows = [DemoRow("dense", perplexity(dense.model, test))]
    say(str(rows[0]))
    allocations = {}
    for name in (*NAMED, DISCOVERED):
        start = time.perf_counter()
        wanted: Any = name
        if name == DISCOVERED:
            wanted = _discover(dense.model, calibration, texts["validation"][:VALIDATION], config, budget)
        # Loaded anew for each: pruning is in place.
        pruner = DSAPruner.from_pretrained(folder, dense.tokenizer)
        report = pruner.prune(calibration, replace(config, allocation=wanted))
        seconds = time.perf_counter() - start
        allocations[name] = report.allocation
        row = DemoRow(name, perplexity(pruner.model, test), report.sparsity, seconds, by_block(report.allocation))
        rows.append(row)
        say(str(rows[-1]))
    pruner.save_pretrained(output)
    path, again = output.shown, quote(str(output.shown))
    say(f"\n{story(rows)}\n\nRemoved from each block, with {DISCOVERED}'s as bars:\n{block_bars(allocations)}\n")
    say(f"Saved the {DISCOVERED} model to {path}. It loads with AutoModelForCausalLM. Try next:")
    say(f"  optimum-cli dsa verify {again}")
    return rows


def _discover(model: Any, calibration: Tensor, validation: Tensor, config: DSAConfig, budget: str) -> Allocation:
    """The allocation that a search finds on windows, (samples, length); of the test text it sees nothing."""
    data = load_calibration(calibration, model)
    options = {"strategy": "descent", "budget": budget, "named": NAMED[1:], "finalists": 1}
    return search(model, data, validation, config, **options).best


def story(rows: Sequence[DemoRow]) -> str:
    """What the table means, in a sentence: the last row against the best of the named ones before it."""
    *named, found = rows[1:]
    best = min(named, key=lambda row: row.perplexity)
    if found.perplexity >= best.perplexity:
        return f"As many zeros in each; here the search found nothing better than {best.name}."
    less = 1 - found.perplexity / best.perplexity
    return (
        f"As many zeros in each, and the discovered model lost least: a search of {found.seconds:.0f} s on other text "
        f"found where this\nmodel can spare weights, and its perplexity is {less:.0%} lower than {best.name}'s."
    )
