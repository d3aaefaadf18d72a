"""How good a pruned model is, row by row: from methods that only choose weights to all that can be done for the rest.

Every row prunes the same dense model, in one process, and is measured on text that nothing was chosen on: `test` and
`wikitext2_test` of the tokens file. `calibration` feeds the pruning, and `validation` the search of the rows that
search. "closed" is the share of the distance from sparsegpt's perplexity at the same sparsity and pattern to the dense
model's that is made up for; "time" is the processor time of pruning over sparsegpt's.

Rows are written to --output as they end, and those that are there are not run again: stop it and start it when you
like; a search goes on in the folder beside it. Rows without sparsegpt's beside them have no time and no share yet.

    python frontier.py                                                       # the embedded model on the demo's text
    python frontier.py MODEL --tokens tokens.safetensors --output rows.jsonl
    python frontier.py MODEL --tokens tokens.safetensors --output rows.jsonl --sparsities 0.7 2:4 --rows alps all
    python frontier.py MODEL --tokens tokens.safetensors --samples 64 --length 512 --windows 64     # the short form
    python frontier.py MODEL --tokens tokens.safetensors --rows "all, searched" --strategy curves --budget "400k"
"""

import argparse
import json
import time
from dataclasses import replace

import torch
from rows import (
    FULL,
    MEASURED,
    Rows,
    add_options,
    add_row_options,
    config_of,
    loaded,
    measured,
    searched,
    share,
    windows_of,
)

from optimum_dsa import DSAConfig, DSAPruner, ValuesConfig


INT8, INT4 = ValuesConfig("int8"), ValuesConfig("int4", group=32)
# Row -> settings of its config; all are uniform but those that name an allocation, or "searched".
ROWS = {
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt + dsa": {"method": "sparsegpt", "allocation": "dsa"},
    "wanda + reconstruct": {"method": "wanda", "reconstruct": True},
    "alps": {"method": "alps"},
    "alps + reconstruct": {"method": "alps", "reconstruct": True},
    "alps, dense targets": {"method": "alps", "update": FULL},
    "sparsegpt, int4": {"method": "sparsegpt", "values": INT4},
    "alps, dense targets, int8": {"method": "alps", "update": FULL, "values": INT8},
    "alps, dense targets, int4": {"method": "alps", "update": FULL, "values": INT4},
    "all": {"method": "alps", "update": FULL, "reconstruct": True},
    "sparsegpt, distilled": {"method": "sparsegpt", "distill": True},
    "all, distilled": {"method": "alps", "update": FULL, "reconstruct": True, "distill": True},
    "all + dsa": {"method": "alps", "update": FULL, "reconstruct": True, "allocation": "dsa"},
    "all, searched": {"method": "alps", "update": FULL, "reconstruct": True, "allocation": "searched"},
    "all, permuted": {"method": "alps", "update": FULL, "reconstruct": True, "permute": True},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--sparsities", nargs="+", type=share, default=["0.7"], help="such as 0.5 0.7 2:4 (default: 0.7)"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all that apply)")
    add_row_options(parser)
    return parser.parse_args()


def run(row: str, config: DSAConfig, tokens: dict[str, torch.Tensor], args: argparse.Namespace) -> dict:
    """Perplexities, and the seconds of pruning, of a model that is loaded anew."""
    model = loaded(args)
    pruner, calibration = DSAPruner(model), tokens["calibration"][: args.samples, : args.length]
    found = {}
    if ROWS[row].get("allocation") == "searched" and args.allocation:
        config = replace(config, allocation=args.allocation)
    elif ROWS[row].get("allocation") == "searched":
        # Searched without training: a candidate is then judged in seconds.
        plain = replace(config, reconstruct=0, permute=None)
        result, seconds = searched(pruner, calibration, plain, tokens["validation"], args)
        found = {"search_seconds": seconds, "allocation": result.best.to_dict()}
        config = replace(config, allocation=result.best)
    start, processor = time.perf_counter(), time.process_time()
    report = pruner.prune(calibration, config)
    wall, processor = time.perf_counter() - start, time.process_time() - processor
    trained = [[block.before, block.after, block.rate, block.steps] for block in report.reconstruction.values()]
    seconds = {"seconds": round(wall, 1), "processor_seconds": round(processor, 1)}
    return {
        "sparsity": report.sparsity,
        **measured(model, tokens, args),
        **seconds,
        "reconstruction": trained,
        "distillation": dict(report.distillation),
        **found,
    }


def line(name: str, row: dict, base: dict | None, whole: dict) -> str:
    """A row as text; `base` is sparsegpt's, `whole` the dense model's."""
    parts = [key for key in MEASURED if key in whole]
    text = f"{name:<28}" + "".join(f"{row[key]:>16.2f}" for key in parts)
    if "processor_seconds" not in row:
        return text
    text += f"{row['seconds']:>9.0f} s"
    if base is None:
        return text
    key = parts[-1]
    lost = base[key] - whole[key]
    closed = f"{(base[key] - row[key]) / lost:>9.0%}" if lost > 0 else f"{'':>9}"
    return text + f"{row['processor_seconds'] / max(base['processor_seconds'], 0.1):>7.1f}{closed}"


def main() -> None:
    args = parse()
    tokens = windows_of(args)
    rows = Rows(args.output, args.model, tokens)
    unknown = [row for row in args.rows or () if row not in ROWS]
    if unknown:
        raise SystemExit(f"no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    common = [args.samples, args.length, args.windows]
    whole = rows.row(json.dumps(["dense", *common]), lambda: measured(loaded(args), tokens, args))
    calibration = tokens["calibration"][: args.samples, : args.length]
    print(f"{args.model}: {' x '.join(map(str, calibration.shape))} calibration tokens, {args.device}")
    heads = "".join(f"{name:>16}" for name in MEASURED if name in whole)
    print(f"{'':<28}{heads}{'':>11}{'time':>7}{'closed':>9}")
    print(line("dense", whole, None, whole), flush=True)
    for sparsity in args.sparsities:
        base = None
        # What the others are held against comes first.
        for row in sorted(args.rows or ROWS, key=lambda row: row != "sparsegpt"):
            if (config := config_of(ROWS[row], sparsity, args)) is None:
                continue
            search = [args.allocation, args.strategy, args.budget]
            extra = search if "searched" in row else []
            key = json.dumps([row, sparsity, config.to_dict(), *common, *extra])
            found = rows.row(key, lambda row=row, config=config: run(row, config, tokens, args))
            base = found if row == "sparsegpt" else base
            print(line(f"{sparsity} {row}", found, base, whole), flush=True)


if __name__ == "__main__":
    main()
