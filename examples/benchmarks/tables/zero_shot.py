"""The seven zero-shot tasks × method, each with the budget spread evenly and by DSA's function.

Tasks are lm-eval's own, or copies with local data in --tasks-path; the last column of tasks is the mean of their
accuracies with its standard error. Where the tasks' data are not to be had, the rows have perplexities alone.

    python zero_shot.py MODEL --tokens tokens.safetensors --output rows.jsonl
    python zero_shot.py MODEL --tokens tokens.safetensors --tasks-path TASKS --limit 200 --sparsities 0.5
"""

from table import DENSE, Row, Table, each_with_dsa, parser_of, with_tasks


METHODS = ("magnitude", "wanda", "sparsegpt")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--tasks", nargs="+", default=["zero-shot"], help="lm-eval's names (default: zero-shot)")
    args = parser.parse_args()
    rows = with_tasks([Row(DENSE), *each_with_dsa(args.methods, args.sparsities)], args.tasks)
    table = Table(args)
    table.run(rows)
    table.print(rows)


if __name__ == "__main__":
    main()
