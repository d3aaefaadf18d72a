"""What training brings back of a model that was made smaller: perplexity before and after, row by row.

The dense model is cut once, and every row trains that smaller model on the same tokens, those of `calibration`, in the
same order. `lora` is LoRA, `grouped` is SAAP's group fine-tuning, whose adapters change groups of input columns alike,
and `full` trains all weights; "distilled" ones learn half from the dense model. What comes out is saved, and measured
in a process of its own on `test` and `wikitext2_test`, which nothing was trained or chosen on.

Rows are written to --output as they end, and those that are there are not run again; with both, the smaller model is
kept in --cut, and taken from there by the next run.

    python structured_recovery.py --steps 20                                # the embedded model on the demo's text
    python structured_recovery.py MODEL --tokens tokens.safetensors --cut smaller --output rows.jsonl --share 0.35
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rows import Rows, add_options, loaded, measured, windows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import DSAPruner, DSAStructuredConfig, RecoveryConfig


LORA = {"method": "sparse-lora"}
# Row -> settings of its `RecoveryConfig`.
ROWS = {
    "lora": LORA,
    "grouped": {**LORA, "mode": "grouped"},
    "full": {"method": "full"},
    "lora, distilled": {**LORA, "distillation": 0.5},
    "full, distilled": {"method": "full", "distillation": 0.5},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--cut", help="folder of the smaller model (default: one that is removed at the end)")
    parser.add_argument(
        "--share", type=float, default=0.35, help="of the blocks' parameters that goes (default: 0.35)"
    )
    parser.add_argument("--importance", default="obs", help="of channels (default: obs)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--steps", type=int, default=300, help="of training (default: 300)")
    parser.add_argument("--train-length", type=int, help="tokens of a window that is trained on (default: all)")
    parser.add_argument("--train-batch", type=int, default=8, help="windows of a step (default: 8)")
    parser.add_argument(
        "--group-size", type=int, default=32, help="columns that `grouped` changes alike (default: 32)"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the folder of a model; used by the script itself
    return parser.parse_args()


def cut(folder: Path, tokens: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
    """The model made smaller, in a folder."""
    if (folder / "config.json").exists():
        sys.exit(f"{folder} holds a model that --output knows no row of: remove it, or name another folder as --cut")
    pruner = DSAPruner(loaded(args), AutoTokenizer.from_pretrained(args.model))
    config = DSAStructuredConfig(args.share, importance=args.importance, batch_size=args.batch_size)
    print(pruner.prune(tokens["calibration"][: args.samples, : args.length], config), flush=True)
    pruner.save_pretrained(folder)


def run(row: str, smaller: Path, tokens: dict[str, torch.Tensor], args: argparse.Namespace) -> dict:
    """Perplexities of the smaller model after training, as a new process loads it, and the seconds that it took."""
    settings = dict(ROWS[row])
    if settings.get("mode") == "grouped":
        settings["group_size"] = args.group_size
    config = RecoveryConfig(steps=args.steps, batch_size=args.train_batch, **settings)
    model = AutoModelForCausalLM.from_pretrained(smaller, dtype=torch.float32).to(args.device)
    pruner = DSAPruner(model, AutoTokenizer.from_pretrained(smaller))
    length = args.train_length or tokens["calibration"].shape[1]
    windows = tokens["calibration"].unfold(1, length, length).flatten(0, 1)
    start = time.perf_counter()
    pruner.recover(windows, config, tokens["validation"][:, :length], loaded(args) if config.distillation else None)
    seconds = round(time.perf_counter() - start, 1)
    with tempfile.TemporaryDirectory() as folder:
        pruner.save_pretrained(folder)
        return {**in_new_process(folder, args), "seconds": seconds}


def in_new_process(folder: str | Path, args: argparse.Namespace) -> dict[str, float]:
    """Perplexities of the model in a folder, loaded by a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    args = parse()
    tokens = windows_of(args)
    if args.measure:
        model = AutoModelForCausalLM.from_pretrained(args.measure, dtype=torch.float32).to(args.device).eval()
        print(json.dumps(measured(model, tokens, args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        smaller = Path(args.cut or scratch)
        rows = Rows(args.output, args.model, tokens)
        common = [args.share, args.importance, args.samples, args.length, args.windows]
        dense = rows.row(json.dumps(["dense", args.windows]), lambda: measured(loaded(args), tokens, args))
        key = json.dumps(["cut", *common])
        if key not in rows or not (smaller / "config.json").exists():
            cut(smaller, tokens, args)
        before = rows.row(key, lambda: in_new_process(smaller, args))
        print(f"{'':<20}{''.join(f'{part:>16}' for part in dense)}{'seconds':>9}")
        for name, found in (("dense", dense), ("cut", before)):
            print(f"{name:<20}{''.join(f'{found[part]:>16.2f}' for part in dense)}", flush=True)
        training = [args.steps, args.train_length, args.train_batch]
        for row in args.rows:
            key = json.dumps([row, *common, *training, *([args.group_size] if row == "grouped" else [])])
            found = rows.row(key, lambda row=row: run(row, smaller, tokens, args))
            parts = "".join(f"{found[part]:>16.2f}" for part in dense)
            print(f"{row:<20}{parts}{found['seconds']:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
