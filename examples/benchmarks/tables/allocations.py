"""Perplexity × sparsity × allocation: what deciding how much every block loses is worth.

The allocations are those of the DSA paper's first table. Each is held against uniform, window by window. An allocation
that is not registered is named at the end as not run.

    python allocations.py                                                      # the embedded model on the demo's text
    python allocations.py MODEL --tokens tokens.safetensors --output rows.jsonl --sparsities 0.5 0.6 --methods wanda
"""

from table import DENSE, Row, Table, markdown, parser_of

from optimum_dsa.evaluation.measurement import with_error


ALLOCATIONS = ("uniform", "global", "er_plus", "er", "besa", "owl", "dsa")


def main() -> None:
    parser = parser_of(__doc__, ("0.5", "0.6", "0.7", "0.8"), tasks=False)
    parser.add_argument("--methods", nargs="+", default=["wanda"], help="default: wanda")
    parser.add_argument("--allocations", nargs="+", default=ALLOCATIONS, help=f"default: {' '.join(ALLOCATIONS)}")
    args = parser.parse_args()
    rows = [
        Row(f"{method} + {allocation}", sparsity, {"method": method, "allocation": allocation},
            against=f"{method} + uniform")
        for sparsity in args.sparsities for method in args.methods for allocation in args.allocations
    ]  # fmt: skip
    table = Table(args)
    table.run([Row(DENSE), *rows])
    table.print([Row(DENSE), *rows])
    print("\nperplexities alone")
    print("\n".join(matrix(table, rows)))


def matrix(table: Table, rows: list[Row]) -> list[str]:
    """A line for each allocation, a column for each sparsity, as papers print it."""
    names, sparsities = (list(dict.fromkeys(values)) for values in zip(*((row.name, row.sparsity) for row in rows)))
    found = {place: with_error(one.perplexity, one.perplexity_error, 2) for place, (one, _) in table.found.items()}
    return markdown(
        {"": names} | {share: [found.get((name, share), "not run") for name in names] for share in sparsities}
    )


if __name__ == "__main__":
    main()
