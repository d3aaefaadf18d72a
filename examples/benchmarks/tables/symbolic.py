"""DSA's allocation against Pruner-Zero's metric, and both together.

Pruner-Zero (Dong et al., 2024, https://arxiv.org/abs/2406.02924) finds a metric of single weights where DSA finds how
much every block loses. Each row is held against wanda, uniform. Where no metric `pruner_zero` is registered, its rows
are named at the end as not run.

    python symbolic.py MODEL --tokens tokens.safetensors --output rows.jsonl
    python symbolic.py MODEL --tokens tokens.safetensors --tasks zero-shot --tasks-path TASKS --limit 200
"""

from table import DENSE, Row, Table, parser_of, with_tasks


METRICS = ("wanda", "pruner_zero")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--metrics", nargs="+", default=METRICS, help=f"default: {' '.join(METRICS)}")
    parser.add_argument("--allocations", nargs="+", default=["uniform", "dsa"], help="default: uniform dsa")
    parser.add_argument("--tasks", nargs="*", default=[], help="such as zero-shot (default: none)")
    args = parser.parse_args()
    rows = [
        Row(f"{metric} + {allocation}", sparsity, {"metric": metric, "allocation": allocation},
            against="wanda + uniform")
        for sparsity in args.sparsities for metric in args.metrics for allocation in args.allocations
    ]  # fmt: skip
    rows = with_tasks([Row(DENSE), *rows], args.tasks)
    table = Table(args)
    table.run(rows)
    table.print(rows)


if __name__ == "__main__":
    main()
