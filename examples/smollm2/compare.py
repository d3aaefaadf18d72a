"""A real model, pruned in several ways and measured: the table, and the best model with its report page and card.

    make demo-real                                             # the quick form
    python examples/smollm2/compare.py                         # the same, in an environment with gguf and matplotlib
    python examples/smollm2/compare.py --long --tokens tokens.safetensors --tasks-path TASKS
    python examples/smollm2/compare.py ./model --text book.txt --sparsities 0.5 0.6 --rows "wanda + dsa"

The quick form prunes at 50 %, with wanda, evenly and by OWL, and measures perplexities: on the text that is shipped
unless --text or --tokens name another. The long form prunes at 50, 60 and 70 %, with wanda and sparsegpt and five
allocations, one of which is searched for, and with what examples/benchmarks/frontier.py has of rows that go further;
where --tasks-path names a folder of tasks, or --tasks names tasks of lm-eval's own, it measures them as well.

Rows are written to --output as they end, and those that are there are not run again. "loss, difference" is the mean
over the windows of the loss less that of the same method with the budget spread evenly, with its standard error: what
is hard in a window is hard for both models, and cancels.
"""

import argparse
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "benchmarks" / "tables"))

import table as tables  # noqa: E402
from best import Best  # noqa: E402
from table import DENSE, Row, Table  # noqa: E402


sys.path.insert(0, str(HERE.parent / "benchmarks"))
from frontier import ROWS as FRONTIER  # noqa: E402
from rows import add_options, add_row_options  # noqa: E402


MODEL = "smollm2-135m"
METHODS = ("wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "owl", "dsa", "alphapruning", "searched")
FURTHER = ("wanda + reconstruct", "alps", "alps, dense targets", "all", "all + dsa", "all, searched")
FURTHER += ("sparsegpt, distilled", "all, distilled")
ON_GRIDS = {"sparsegpt, int4": "sparsegpt + uniform"}  # row -> what it is held against
ON_GRIDS |= {f"alps, dense targets, {values}": "alps, dense targets" for values in ("int8", "int4")}
# Numbers that make the quick form one of minutes.
QUICK = {
    "samples": 16,
    "length": 128,
    "windows": 32,
    "sparsities": ["0.5"],
    "rows": ["wanda + uniform", "wanda + owl"],
}


def rows_of(sparsity: str) -> dict[str, Row]:
    """All rows of a sparsity by name, each with what it is held against."""
    rows = {}
    for method in METHODS:
        for allocation in ALLOCATIONS:
            settings = {"method": method, "allocation": allocation}
            name = f"{method} + {allocation}"
            rows[name] = Row(name, sparsity, settings, against=f"{method} + uniform")
    for name in FURTHER:
        against = "all" if name.startswith("all") else "sparsegpt + uniform"
        rows[name] = Row(name, sparsity, FRONTIER[name], against=against)
    for name, against in ON_GRIDS.items():
        rows[name] = Row(name, sparsity, FRONTIER[name], against=against)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(model=MODEL)
    tables.add_task_options(parser)
    parser.add_argument("--folder", type=Path, default=Path("demo-real"), help="for rows, table and models")
    parser.add_argument("--long", action="store_true", help="all rows at 50, 60 and 70 %%, on all windows")
    tables.add_sparsities(parser, None, "default: 0.5; long: 0.5 0.6 0.7")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(rows_of(''))}")
    parser.add_argument("--tasks", nargs="+", help="default: zero-shot, where --tasks-path is given; else none")
    add_row_options(parser)
    args = parser.parse_args()
    full = {"sparsities": ["0.5", "0.6", "0.7"], "rows": list(rows_of(""))}
    for name, value in (full if args.long else QUICK).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.tasks is None:
        args.tasks = ["zero-shot"] if args.tasks_path else []
    args.output = args.output or str(args.folder / "rows.jsonl")
    return args


def main() -> None:
    args = parse()
    if unknown := [row for row in args.rows if row not in rows_of("")]:
        sys.exit(f"no row {unknown[0]!r}; there are {', '.join(rows_of(''))}")
    if args.model == MODEL and not Path(MODEL).is_dir():
        subprocess.run([sys.executable, str(HERE / "get_model.py"), "-o", MODEL], check=True)
    best = Best(args.folder, Path(str(args.model)).name)
    table = Table(args, best)
    if args.tasks and table.tasks(tuple(args.tasks)) is None:
        sys.exit("; ".join(f"{name}: {why}" for name, why in table.missing.items()))
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = [Row(DENSE), *(rows_of(sparsity)[name] for sparsity in args.sparsities for name in args.rows)]
    rows = tables.with_tasks(rows, args.tasks)
    table.run(rows)
    (args.folder / "table.md").write_text(table.print(rows), encoding="utf-8")
    places = best.finish(table, args.sparsities)
    print(f"\nthe table is {args.folder / 'table.md'}; the best of each sparsity, with report.html and README.md:")
    print("\n".join(f"  {place}" for place in places))


if __name__ == "__main__":
    main()
