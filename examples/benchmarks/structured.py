"""How good a smaller model is, row by row, and how much faster: importances, allocations, updates and learners.

Every row cuts the same dense model by the same share, and is measured on text that nothing was chosen on: `test` and
`wikitext2_test` of the tokens file. `calibration` feeds importances, fits and learners; `validation` is what searches
compare by. Shares are of the blocks' parameters, and in the row "latency" of the time that this machine takes.
"closed" is the share of the distance from FLAP's perplexity (flap, refit none) to the dense model's that is made up
for. Prefill and decode are tokens a second over the dense model's, measured in turn in one process with one thread.

Rows are written to --output as they end, and those that are there are not run again.

    python structured.py                                                     # the embedded model on the demo's text
    python structured.py MODEL --tokens tokens.safetensors --output rows.jsonl --shares 0.2 0.35
    python structured.py MODEL --tokens tokens.safetensors --rows "flap" "obs, refit" "obs, all" --shares 0.5
"""

import argparse
import json
import time
from dataclasses import replace

import torch
from rows import Rows, add_options, loaded, measured, searched, windows_of

from optimum_dsa import (
    DSAPruner,
    DSAStructuredConfig,
    measure_speed,
)


REFIT = {"update": "refit"}
FREE = {"layout": "per_layer"}  # widths of blocks may differ
FULL = {"update": "refit", "targets": "dense", "residual": True}
# Row -> settings of its config; what is not said is uniform, without an update, and of channels.
ROWS = {
    "random": {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "magnitude_l1": {"importance": "magnitude_l1"},
    "wanda_sp": {},
    "flap": {"importance": "flap"},
    "flap, bias": {"importance": "flap", "update": "bias"},
    "taylor": {"importance": "taylor"},
    "taylor_vector": {"importance": "taylor_vector"},
    "taylor_second": {"importance": "taylor_second"},
    "taylor_mix": {"importance": "taylor_mix"},
    "taylor, heads too": {"importance": "taylor", "structures": ("ffn", "kv_group"), **FREE},
    "saap": {"importance": "saap"},
    "saap, stability": {"importance": "saap", "allocation": "stability", **FREE},
    "saap, stability, more": {"importance": "saap", "allocation": "stability", "unstable": "more", **FREE},
    "blocks": {"importance": "block_influence", "structures": ("block",)},
    "parts": {"importance": "block_influence", "structures": ("attention", "mlp"), **FREE},
    "parts, random": {"importance": "random", "structures": ("attention", "mlp"), **FREE},
    "parts, searched": {"structures": ("attention", "mlp"), "allocation": "searched", **FREE},
    "random, refit": {"importance": "random", **REFIT},
    "magnitude, refit": {"importance": "magnitude", **REFIT},
    "wanda_sp, refit": REFIT,
    "flap, refit": {"importance": "flap", **REFIT},
    "taylor, refit": {"importance": "taylor", **REFIT},
    "tyr, refit": {"importance": "tyr", **REFIT},
    "saap, refit": {"importance": "saap", **REFIT},
    "obs, refit": {"importance": "obs", **REFIT},
    "obs, refit, 4 rounds": {"importance": "obs", "rounds": 4, **REFIT},
    "obs, refit, heads too": {"importance": "obs", "structures": ("ffn", "kv_group"), **REFIT, **FREE},
    "obs, refit, owl": {"importance": "obs", "allocation": "owl", **REFIT, **FREE},
    "obs, refit, stability": {"importance": "obs", "allocation": "stability", **REFIT, **FREE},
    "obs, refit, global": {"importance": "obs", "allocation": "global", **REFIT, **FREE},
    "obs, refit, fisher": {"importance": "obs", "allocation": "fisher", **REFIT, **FREE},
    "obs, refit, milp": {"importance": "obs", "allocation": "milp", **REFIT, **FREE},
    "obs, refit, latency": {
        "importance": "obs",
        "structures": ("ffn", "kv_group"),
        "allocation": "milp",
        "cost": "latency",
        **REFIT,
        **FREE,
    },
    "obs, refit, searched": {"importance": "obs", "allocation": "searched", **REFIT, **FREE},
    "obs, dense targets": {"importance": "obs", **FULL},
    "obs, refit, reconstructed": {"importance": "obs", **REFIT, "reconstruct": True},
    "wanda_sp, all": {**FULL, "reconstruct": True},
    "obs, all": {"importance": "obs", **FULL, "reconstruct": True},
    "obs, all, searched": {"importance": "obs", "allocation": "searched", **FULL, "reconstruct": True, **FREE},
    "policy_gradient, refit": {"learner": "policy_gradient", **REFIT, **FREE},
    "hard_concrete, refit": {"learner": "hard_concrete", **REFIT, **FREE},
    "deterministic_gates": {"learner": "deterministic_gates", **FREE},
    "deterministic_gates, refit": {"learner": "deterministic_gates", **REFIT, **FREE},
    "projected_gates": {"learner": "projected_gates", **FREE},
    "projected_gates, refit": {"learner": "projected_gates", **REFIT, **FREE},
    "projected_gates, all": {"learner": "projected_gates", **FULL, "reconstruct": True, **FREE},
}
BASE = "flap"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.2, 0.35, 0.5], help="that go (default: 0.2 0.35 0.5)"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"of {'; '.join(ROWS)} (default: all)")
    parser.add_argument("--steps", type=int, default=64, help="of reconstruction (default: 64)")
    parser.add_argument("--learn-steps", type=int, default=200, help="of learners (default: 200)")
    parser.add_argument("--strategy", default="evolution", help="of a search (default: evolution)")
    parser.add_argument("--allocation", help="found before, instead of a search: JSON, or the folder of a search")
    parser.add_argument("--budget", default="60k tokens", help="of a search (default: 60k tokens)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="in which speed is measured (default: bfloat16)",
    )
    parser.add_argument("--no-speed", action="store_true", help="measure perplexity alone")
    return parser.parse_args()


def config_of(row: str, share: float, args: argparse.Namespace) -> DSAStructuredConfig:
    """What a row asks for, a search not counted."""
    settings = {"update": "none", "batch_size": args.batch_size, **ROWS[row]}
    if settings.get("allocation") == "searched":
        settings["allocation"] = "uniform"
    if settings.pop("reconstruct", False):
        settings["reconstruct"] = args.steps
    if "learner" in settings:
        settings["learn_steps"] = args.learn_steps
    return DSAStructuredConfig(share, **settings)


def run(row: str, share: float, tokens: dict[str, torch.Tensor], args: argparse.Namespace) -> dict:
    """Perplexities, seconds and speed of a model that is loaded anew."""
    model, config = loaded(args), config_of(row, share, args)
    pruner, calibration, found = DSAPruner(model), tokens["calibration"][: args.samples, : args.length], {}
    start = time.perf_counter()
    if ROWS[row].get("allocation") == "searched" and args.allocation:
        config = replace(config, allocation=args.allocation)
    elif ROWS[row].get("allocation") == "searched":
        plain = config_of(row.replace("all", "refit"), share, args)
        result, seconds = searched(pruner, calibration, plain, tokens["validation"], args)
        found = {"search_seconds": seconds, "allocation": result.best.to_dict()}
        config = replace(config, allocation=result.best)
        start = time.perf_counter()
    report = pruner.prune(calibration, config)
    seconds = round(time.perf_counter() - start, 1)
    found |= {"share": report.sparsity, **measured(pruner.model, tokens, args), "seconds": seconds}
    if not args.no_speed:
        torch.set_num_threads(1)
        dense, smaller = (each.to(getattr(torch, args.dtype)) for each in (loaded(args), pruner.model))
        speeds = measure_speed({"dense": dense, "smaller": smaller}, prompt=256, new_tokens=32, rounds=3).speeds
        for way in ("prefill", "decode"):
            found[way] = round(getattr(speeds["smaller"], way) / getattr(speeds["dense"], way), 3)
    return found


def main() -> None:
    args = parse()
    tokens = windows_of(args)
    rows = Rows(args.output, args.model, tokens)
    unknown = [row for row in args.rows or () if row not in ROWS]
    if unknown:
        raise SystemExit(f"no row {unknown[0]!r}; there are {'; '.join(ROWS)}")
    common = [args.samples, args.length, args.windows, None if args.no_speed else args.dtype]
    whole = rows.row(json.dumps(["dense", *common]), lambda: measured(loaded(args), tokens, args))
    parts = list(whole)
    print(f"{'':<34}{''.join(f'{part:>16}' for part in parts)}{'seconds':>9}{'prefill':>9}{'decode':>8}{'closed':>8}")
    print(f"{'dense':<34}{''.join(f'{whole[part]:>16.2f}' for part in parts)}", flush=True)
    for share in args.shares:
        base = None
        # What the others are held against comes first.
        for row in sorted(args.rows or ROWS, key=lambda row: row != BASE):
            search = [args.allocation, args.strategy, args.budget] if "searched" in row else []
            key = json.dumps([row, config_of(row, share, args).to_dict(), *common, *search])
            found = rows.row(key, lambda row=row, share=share: run(row, share, tokens, args))
            base = found if row == BASE else base
            text = (
                f"{f'{share:g} {row}':<34}{''.join(f'{found[part]:>16.2f}' for part in parts)}{found['seconds']:>9.0f}"
            )
            text += "".join(f"{found.get(way, 0):>{width}.2f}" for way, width in (("prefill", 9), ("decode", 8)))
            if base is not None and (lost := base[parts[-1]] - whole[parts[-1]]) > 0:
                text += f"{(base[parts[-1]] - found[parts[-1]]) / lost:>8.0%}"
            print(text, flush=True)


if __name__ == "__main__":
    main()
