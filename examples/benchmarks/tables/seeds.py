"""The same rows from several draws of the calibration text: how much of a difference is luck.

Every seed draws --samples of the calibration windows, by default half of them. The second table has the mean of the
perplexities over the seeds and their standard deviation, and the mean over the seeds of the loss less uniform's, with
its standard error over the seeds.

    python seeds.py MODEL --tokens tokens.safetensors --output rows.jsonl
    python seeds.py MODEL --tokens tokens.safetensors --seeds 0 1 2 --sparsities 0.6 --allocations uniform dsa
"""

import statistics

from table import DENSE, Row, Table, loss_difference, markdown, parser_of, signed, with_tasks

from optimum_dsa.evaluation.measurement import with_error


def main() -> None:
    parser = parser_of(__doc__, ("0.5",))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 1 2 3 4")
    parser.add_argument("--methods", nargs="+", default=["wanda"], help="default: wanda")
    parser.add_argument("--allocations", nargs="+", default=["uniform", "owl", "dsa"], help="default: uniform owl dsa")
    parser.add_argument("--tasks", nargs="*", default=[], help="measured for every seed as well (default: none)")
    args = parser.parse_args()
    table = Table(args)
    args.samples = args.samples or max(1, len(table.tokens["calibration"]) // 2)
    rows = [
        Row(f"{method} + {allocation}, seed {seed}", sparsity, {"method": method, "allocation": allocation},
            against=f"{method} + uniform, seed {seed}", seed=seed)
        for sparsity in args.sparsities for method in args.methods
        for allocation in args.allocations for seed in args.seeds
    ]  # fmt: skip
    rows = with_tasks([Row(DENSE), *rows], args.tasks)
    table.run(rows)
    table.print(rows)
    print(f"\nover {len(args.seeds)} seeds")
    print("\n".join(markdown(over_seeds(table, rows[1:]))))


def over_seeds(table: Table, rows: list[Row]) -> dict[str, list[str]]:
    """A line for each method, allocation and sparsity: mean and scatter of what its seeds gave."""
    columns: dict[str, list[str]] = {"": [], "seeds": [], "perplexity": [], "loss, difference": []}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name.rpartition(", ")[0], row.sparsity), []).append(row)
    for (name, sparsity), group in groups.items():
        found = [table.found[row.name, row.sparsity][0] for row in group if (row.name, row.sparsity) in table.found]
        if not found:
            continue
        pairs = [(table.found.get((row.against, sparsity)), table.found.get((row.name, sparsity))) for row in group]
        changes = [loss_difference(one[0], other[0])[0] for one, other in pairs if one and other]
        changes = [change for change in changes if change is not None]
        columns[""].append(f"{name}, {sparsity}")
        columns["seeds"].append(str(len(found)))
        columns["perplexity"].append(with_error(*scatter([one.perplexity for one in found]), 2))
        mean, deviation = scatter(changes)
        error = None if deviation is None else deviation / len(changes) ** 0.5
        columns["loss, difference"].append("" if name.endswith("+ uniform") else signed(mean, error))
    return columns


def scatter(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; `None` where there are too few values."""
    return (statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None)


if __name__ == "__main__":
    main()
