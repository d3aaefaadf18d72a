"""What tables of perplexities share: text, models, and rows that are written as they end and not run again."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import demo_texts, load_tokens, perplexity


MEASURED = ("validation", "test", "wikitext2_test")


def windows_of(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Part -> token ids, (windows, length)."""
    if args.tokens:
        return {name: value.long() for name, value in load_file(args.tokens).items()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
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


class Rows:
    """Finished rows by what they depend on, kept in a file, a JSON object a line, where there is one."""

    def __init__(self, path: str | None):
        self.path = Path(path) if path else None
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        self.known = {line["key"]: line["row"] for line in map(json.loads, lines)}

    def row(self, key: str, make: Callable[[], dict]) -> dict:
        """The row of this key, as it was found before, or made now."""
        if key not in self.known:
            self.known[key] = make()
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, "row": self.known[key]}) + "\n")
        return self.known[key]
