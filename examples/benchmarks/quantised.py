"""What whole numbers cost a pruned model: its perplexity with kept weights in bf16, and on grids of 8 and 4 bits.

Every row takes the same pruned model, puts its kept weights on a grid (zeros stay what they are), and is measured on
text that nothing was chosen on. `calibration` of the tokens file, run once through the pruned model, feeds the rows
that look at inputs: "mse" weighs errors by them, "feedback" makes up for errors column by column. "bits" are those
that a weight of a pruned matrix takes, zeros included: mask, numbers and scales.

Rows are written to --output as they end, and those that are there are not run again.

    python quantised.py PRUNED --tokens tokens.safetensors --output rows.jsonl
    python quantised.py PRUNED --tokens tokens.safetensors --samples 32 --rows "int4 32 feedback"
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import cache

import torch
from rows import Rows, file_there, loaded, measured, windows_of

from optimum_dsa import demo_model, own_device
from optimum_dsa.model.architecture import find_architecture
from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.pruning.unstructured.grid import on_grid


# bits, columns that share a scale (0: a row), how they are chosen
ROWS = [
    "bf16",
    *(f"int8 {group} {way}" for group in (0, 128) for way in ("absmax", "mse", "feedback")),
    *(f"int4 {group} {way}" for group in (128, 64, 32) for way in ("absmax", "mse", "feedback")),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=demo_model(), help="a pruned model (default: the embedded one)")
    parser.add_argument(
        "--tokens", type=file_there, help="safetensors file with calibration, wikitext2_test, ...; default: demo text"
    )
    parser.add_argument("--output", help="file of finished rows, a JSON object a line; those in it are not run again")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--samples", type=int, help="calibration windows (default: all)")
    parser.add_argument("--windows", type=int, help="windows that are measured (default: all)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default=str(own_device()))
    return parser.parse_args()


def statistics_of(args: argparse.Namespace) -> dict[str, LayerStatistics]:
    """X·Xᵀ of the input of every matrix of the pruned model."""
    model, calibration = loaded(args), windows_of(args)["calibration"][: args.samples]
    batches = [{"input_ids": part.to(model.device)} for part in calibration.split(args.batch_size)]
    walk = walk_blocks(model, find_architecture(model), batches, reads=frozenset({"gram"}), sequential=False)
    return {name: seen for walked in walk for name, seen in walked.statistics.items()}


@torch.no_grad()
def put_on_grid(model: torch.nn.Module, row: str, statistics: Callable[[], dict[str, LayerStatistics]]) -> float:
    """Put the prunable weights of a model on a grid, in place; the mean bits that each takes then."""
    kind, group, way = row.split()
    bits, group, scales = int(kind[3:]), int(group), "absmax" if way == "absmax" else "mse"
    known = {} if way == "absmax" else statistics()
    taken = weights = 0
    for walked in walk_blocks(model, find_architecture(model), None):
        for weight in walked.weights:
            tensor, seen = walked.tensor(weight), known.get(weight.name)
            tensor.copy_(on_grid(tensor, seen, bits, group, scales, feedback=way == "feedback"))
            taken += 8 * len(PackedMatrix.quantised(tensor, bits).to_bytes())
            weights += weight.size
    return taken / weights


def bits_in_bf16(model: torch.nn.Module) -> float:
    taken = weights = 0
    for walked in walk_blocks(model, find_architecture(model), None):
        for weight in walked.weights:
            packed = PackedMatrix.of(walked.tensor(weight).bfloat16()).to_bytes()
            taken += 8 * len(packed) if packed is not None else 16 * weight.size
            weights += weight.size
    return taken / weights


def made(row: str, tokens: dict[str, torch.Tensor], args: argparse.Namespace, statistics: Callable) -> dict:
    model, start = loaded(args), time.process_time()
    if row == "bf16":
        bits = bits_in_bf16(model)
        for weight in model.parameters():
            weight.data = weight.bfloat16().float()
    else:
        bits = put_on_grid(model, row, statistics)
    seconds = time.process_time() - start
    return {"row": row, "bits": round(bits, 2), "seconds": round(seconds), **measured(model, tokens, args)}


def main() -> None:
    args = parse()
    tokens = windows_of(args)
    rows = Rows(args.output, args.model, tokens)
    # Of the same model for all rows; not collected where no row asks.
    statistics = cache(lambda: statistics_of(args))
    for row in args.rows:
        facts = [row, args.samples, args.windows]
        print(json.dumps(rows.row(json.dumps(facts), lambda row=row: made(row, tokens, args, statistics))), flush=True)


if __name__ == "__main__":
    main()
