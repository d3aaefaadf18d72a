"""GSM8K and MMLU after pruning, and GSM8K for every N:M pattern: what a perplexity hides.

At --sparsities both are measured, uniform and with DSA's function; under --patterns GSM8K alone. Perplexities stand
beside them. GSM8K is generated, and takes by far the longest: begin with --limit.

    python reasoning.py MODEL --tokens tokens.safetensors --output rows.jsonl
    python reasoning.py MODEL --tokens tokens.safetensors --tasks-path TASKS --limit 50 --patterns 2:4 4:8
"""

from table import DENSE, Row, Table, each_with_dsa, parser_of, with_tasks


PATTERNS = ("2:4", "4:8", "6:8", "8:16")  # the first number is how many stay


def main() -> None:
    parser = parser_of(__doc__, ("0.5",))
    parser.add_argument("--patterns", nargs="*", default=PATTERNS, help=f"default: {' '.join(PATTERNS)}")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"], help="default: wanda sparsegpt")
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "mmlu"], help="default: gsm8k mmlu")
    parser.add_argument("--pattern-tasks", nargs="+", default=["gsm8k"], help="under patterns (default: gsm8k)")
    args = parser.parse_args()
    rows = with_tasks([Row(DENSE), *each_with_dsa(args.methods, args.sparsities)], args.tasks)
    patterns = [Row(method, pattern, {"method": method}) for pattern in args.patterns for method in args.methods]
    patterns = with_tasks(patterns, args.pattern_tasks)
    table = Table(args)
    table.run([*rows, *patterns])
    table.print([*rows, *patterns])


if __name__ == "__main__":
    main()
