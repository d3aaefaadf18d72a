"""The embedded model: a small Llama trained on the text that every CPython carries, and what to try with it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote

from ..common.output import OutputFolder
from ..data import load_tokens
from ..evaluation.perplexity import perplexity
from ..pruner import DSAPruner
from ..pruning.configuration import DSAConfig


LENGTH = 256
ALLOCATIONS = ("uniform", "owl", "dsa")


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


def run_demo(output: str, sparsity: float, method: str, say: Callable[[str], None]) -> None:
    """Prune the embedded model with each of `ALLOCATIONS`, report, and save the last one to `output`."""
    configs = {name: DSAConfig(sparsity, method, name) for name in ALLOCATIONS}
    with OutputFolder(output) as place:
        _compare(place, configs, say)
    say("  optimum-cli dsa prune Qwen/Qwen3-0.6B -o qwen3-60 --sparsity 0.6     (downloads model and text)")
    say("  optimum-cli dsa prune --help")


def _compare(output: OutputFolder, configs: Mapping[str, DSAConfig], say: Callable[[str], None]) -> None:
    folder = demo_model()
    dense = DSAPruner.from_pretrained(folder)
    calibration = load_tokens(demo_texts("calibration"), dense.tokenizer, num_samples=128, sequence_length=LENGTH)
    test = load_tokens(demo_texts("test"), dense.tokenizer, sequence_length=LENGTH)[:64]
    first = next(iter(configs.values()))
    parameters = sum(parameter.numel() for parameter in dense.model.parameters())
    say(
        f"{parameters / 1e6:.1f} M parameters, pruned to {first.sparsity:.0%} with {first.method}. Calibrated on "
        f"{calibration.numel():,} tokens;\nperplexity on {test.numel():,} tokens that nothing else has seen.\n"
    )
    say(f"{'allocation':<12}{'perplexity':>12}{'sparsity':>12}{'seconds':>10}")
    say(f"{'dense':<12}{perplexity(dense.model, test):>12.2f}{0:>12.4f}{'':>10}")
    for name, config in configs.items():
        pruner = DSAPruner.from_pretrained(folder, dense.tokenizer)
        start = time.perf_counter()
        report = pruner.prune(calibration, config)
        seconds = time.perf_counter() - start
        say(f"{name:<12}{perplexity(pruner.model, test):>12.2f}{report.sparsity:>12.4f}{seconds:>10.1f}")
    pruner.save_pretrained(output)
    path = output.shown
    say(f"\n{report}\n\nSaved the {name} model to {path}. It loads with AutoModelForCausalLM. Try next:")
    again, target = quote(str(path)), quote(f"{path}-80")
    say(f"  optimum-cli dsa prune {again} -o {target} --sparsity 0.8 --dataset YOUR.txt --sequence-length {LENGTH}")
