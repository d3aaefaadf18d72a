"""What tables of pruned models share: options, text, models, settings of a row, and rows that are not run again."""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import (
    DSAConfig,
    DSAPruner,
    DSAStructuredConfig,
    ReconstructConfig,
    SearchResult,
    UpdateConfig,
    demo_model,
    demo_texts,
    load_tokens,
    own_device,
    perplexity,
    split_windows,
)
from optimum_dsa.data import fingerprint


MEASURED = ("validation", "test", "wikitext2_test")
FULL = UpdateConfig(targets="dense", true_sequential=True, residual=True)
PARTS = {"calibration": 0.5, "validation": 0.125}  # of a text; the rest is the test


def model_there(name: str) -> str:
    """An option that is a folder, or the Hub id of a model."""
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {name}")
    return name


def file_there(path: str) -> str:
    """An option that is a file."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


def share(text: str) -> str:
    """An option that is a sparsity, such as "0.5", or a pattern, such as "2:4"."""
    stay, of, width = text.partition(":")
    try:
        known = 0 < int(stay) < int(width) if of else 0 <= float(stay) < 1
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 0.5, and no pattern such as 2:4")
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is pruned, on which text, and where rows are kept."""
    parser.add_argument(
        "model",
        nargs="?",
        type=model_there,
        default=demo_model(),
        help="a folder or Hub id (default: the embedded one)",
    )
    parser.add_argument(
        "--tokens",
        type=file_there,
        help="safetensors file with calibration, validation, test, ...; default: demo text",
    )
    parser.add_argument(
        "--text", type=file_there, help="text file instead, which is cut into windows; each is of one part"
    )
    parser.add_argument("--output", help="file of finished rows, a JSON object a line; those in it are not run again")
    parser.add_argument("--samples", type=int, help="calibration windows (default: all)")
    parser.add_argument("--length", type=int, help="their tokens (default: all)")
    parser.add_argument("--windows", type=int, help="windows that are measured (default: all)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default=str(own_device()))


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """How rows are made that train blocks, order channels, or search."""
    parser.add_argument("--steps", type=int, default=64, help="of reconstruction (default: 64)")
    parser.add_argument(
        "--distill", type=int, default=64, help="steps of distillation, in rows so named (default: 64)"
    )
    parser.add_argument("--rate", type=float, help="of reconstruction (default: found on windows held out)")
    parser.add_argument("--span", type=int, default=1, help="blocks that are reconstructed together (default: 1)")
    parser.add_argument("--permute", default="ria", help="order of channels of the rows that change it (default: ria)")
    parser.add_argument("--allocation", help="found before, instead of a search: JSON, or the folder of a search")
    parser.add_argument("--strategy", default="auto", help="of a search (default: auto)")
    parser.add_argument("--budget", default="300k tokens", help="of a search (default: 300k tokens)")


def windows_of(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Part -> token ids, (windows, length)."""
    if args.tokens:
        return {name: value.long() for name, value in load_file(args.tokens).items()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if getattr(args, "text", None):
        try:
            windows = load_tokens(args.text, tokenizer, sequence_length=args.length or 512)
        except ValueError as error:
            sys.exit(str(error))
        counts = {name: int(share * len(windows)) for name, share in PARTS.items()}
        counts["test"] = len(windows) - sum(counts.values())
        if not all(counts.values()):
            sys.exit(
                f"{args.text} is {len(windows)} windows of {windows.shape[1]} tokens, too few for {len(counts)} parts"
            )
        return split_windows(windows, counts)
    sizes = {"num_samples": 32, "sequence_length": 128}
    return {part: load_tokens(demo_texts(part), tokenizer, **sizes) for part in ("calibration", "validation", "test")}


def loaded(args: argparse.Namespace) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()


def measured(model: torch.nn.Module, tokens: dict[str, torch.Tensor], args: argparse.Namespace) -> dict[str, float]:
    return {
        name: round(perplexity(model, tokens[name][: args.windows], args.batch_size), 3)
        for name in MEASURED
        if name in tokens
    }


def config_of(row: Mapping[str, Any], sparsity: str, args: argparse.Namespace) -> DSAConfig | None:
    """What a row asks for at a sparsity such as "0.5", or under a pattern such as "2:4"; `None` where it says nothing.

    An allocation "searched" is uniform here, and found by `searched`; `reconstruct`, `distill` and `permute` that
    are `True` are as the options say.
    """
    settings = dict(row)
    pattern = sparsity if ":" in sparsity else None
    share = 1 - int(pattern.split(":")[0]) / int(pattern.split(":")[1]) if pattern else float(sparsity)
    allocation = settings.get("allocation", "uniform")
    if pattern and allocation != "uniform" or not pattern and "permute" in settings:
        return None
    settings["allocation"] = "uniform" if allocation == "searched" else allocation
    if settings.pop("permute", False):
        settings["permute"] = args.permute
    blocks = (args.steps, args.rate, args.span) if settings.pop("reconstruct", False) else ()
    distill = args.distill if settings.pop("distill", False) else 0
    settings["reconstruct"] = ReconstructConfig(*blocks, distill=distill)
    return DSAConfig(share, pattern=pattern, batch_size=args.batch_size, **settings)


def searched(
    pruner: DSAPruner,
    calibration: torch.Tensor,
    config: DSAConfig | DSAStructuredConfig,
    validation: torch.Tensor,
    args: argparse.Namespace,
) -> tuple[SearchResult, float]:
    """An allocation for what `config` does, and the seconds that it took; a search that was killed goes on."""
    start = time.perf_counter()
    asked = {"strategy": args.strategy, "budget": args.budget, "validation": validation}
    if args.output:
        what = config.method if isinstance(config, DSAConfig) else f"{config.importance} {config.update}"
        name = [args.strategy, args.budget, str(config.sparsity), what]
        place = re.sub(r"\W+", "-", " ".join(name))
        asked |= {"output": f"{args.output}.search-{place}", "resume": True}
    return pruner.search(calibration, config, **asked), round(time.perf_counter() - start, 1)


def stamp(model: str | Path) -> list[Any]:
    """What tells a model from another of its name: of a folder its files, how large they are, and of when."""
    files = sorted(file for kind in ("*.safetensors", "config.json") for file in Path(model).glob(kind))
    return [str(model), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


class Rows:
    """Finished rows by what they depend on, kept in a file, a JSON object a line, where there is one.

    Args:
        model, tokens: of all of them. What lies under the same name by now may be another one.
    """

    def __init__(self, path: str | None, model: str | Path, tokens: Mapping[str, torch.Tensor]):
        self._of = json.dumps([stamp(model), {name: fingerprint(value) for name, value in tokens.items()}])
        self.path = Path(path) if path else None
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        self.known = {line["key"]: line["row"] for line in map(json.loads, lines)}

    def __contains__(self, key: str) -> bool:
        return f"{self._of} {key}" in self.known

    def row(self, key: str, make: Callable[[], dict]) -> dict:
        """The row of this key, as it was found before, or made now."""
        key = f"{self._of} {key}"
        if key not in self.known:
            self.known[key] = make()
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, "row": self.known[key]}) + "\n")
        return self.known[key]
