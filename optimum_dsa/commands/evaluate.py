"""`optimum-cli dsa evaluate`."""

from __future__ import annotations

from .base import LeafCommand, add_loading_options, loading_options, say


class EvaluateCommand(LeafCommand):
    """Perplexity, tasks and sparsity of one checkpoint, or of several side by side."""

    DESCRIPTION = """\
Measure a model's perplexity on a text (non-overlapping windows) and its results on tasks of lm-eval, and count its
zeros. Several models give a table. The zero-shot tasks of the DSA paper are
boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa.
"""
    EXAMPLES = """\
  optimum-cli dsa evaluate out --dataset test.txt
  optimum-cli dsa evaluate out --dataset wikitext2 --sequence-length 2048 --json
  optimum-cli dsa evaluate out --tasks boolq,rte,arc_easy
  optimum-cli dsa evaluate dense pruned recovered --dataset test.txt --tasks ./my_task.yaml --output results.json
"""

    @staticmethod
    def parse_args(parser):
        EvaluateCommand.describe(parser, "evaluate")
        parser.add_argument("model", nargs="+", help="folders or Hub ids")
        text = parser.add_argument_group("perplexity")
        text.add_argument("--dataset", help=".txt, .jsonl or .parquet file, or a dataset's name")
        text.add_argument("--split", default="test", help="split of a named dataset (default: %(default)s)")
        text.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
        text.add_argument("--sequence-length", type=int, help="tokens per window (default: the model's, max 2048)")
        text.add_argument("--num-samples", type=int, help="use this many windows, drawn by --seed (default: all)")
        text.add_argument("--seed", type=int, default=0)
        tasks = parser.add_argument_group("tasks (needs lm-eval, which the extra `eval` brings)")
        tasks.add_argument("--tasks", help="names of lm-eval's tasks, or YAML files, with commas between them")
        tasks.add_argument("--include-path", help="folder of further YAML files of tasks")
        tasks.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
        tasks.add_argument("--limit", type=int, help="questions per task (default: all)")
        parser.add_argument("--batch-size", type=int, default=8)
        parser.add_argument("--output", help="JSON file to write all results to")
        add_loading_options(parser)

    def execute(self) -> dict | list[dict]:
        import contextlib
        import sys

        from ..evaluation.comparison import check_results, comparison_table, save_results

        args = self.args
        if not args.dataset and not args.tasks:
            raise ValueError("say what to measure: --dataset FILE, --tasks NAMES, or both")
        for name in ("sequence_length", "num_samples", "batch_size", "limit"):
            if getattr(args, name) is not None and getattr(args, name) < (2 if name == "sequence_length" else 1):
                raise ValueError(f"--{name.replace('_', '-')} is too small: {getattr(args, name)}.")
        if args.output:
            check_results(args.output)
        with contextlib.redirect_stdout(sys.stderr):  # data sets and lm-eval print
            results = [self.measure(model) for model in args.model]
        if args.output:
            save_results(args.output, results)
        say(comparison_table(results) if len(results) > 1 else describe(results[0]))
        found = [result.to_dict() for result in results]
        return found if len(found) > 1 else found[0]

    def measure(self, model: str):
        """The `Measured` of one model."""
        from ..data import default_length, load_tokens
        from ..data import describe as name_of
        from ..evaluation.comparison import Measured
        from ..evaluation.perplexity import perplexity_with_error
        from ..evaluation.tasks import evaluate_tasks
        from ..model.architecture import find_architecture
        from ..model.walk import walk_blocks
        from ..pruner import DSAPruner

        args = self.args
        pruner = DSAPruner.from_pretrained(model, **loading_options(args))
        if pruner.tokenizer is None:
            raise ValueError(f"{model} has no tokenizer, so its text cannot be read.")
        zeros = size = 0
        for walked in walk_blocks(pruner.model, find_architecture(pruner.model, skip_unprunable=True), None):
            for weight in walked.weights:
                zeros += int((walked.tensor(weight) == 0).sum())
                size += weight.size
        found: dict = {}
        if args.dataset:
            length = args.sequence_length or default_length(pruner.model)
            options = {"num_samples": args.num_samples, "seed": args.seed, "split": args.split}
            tokens = load_tokens(
                args.dataset, pruner.tokenizer, sequence_length=length, text_column=args.text_column, **options
            )
            value, error = perplexity_with_error(pruner.model, tokens, args.batch_size)
            text = {"dataset": name_of(args.dataset), "windows": len(tokens), "sequence_length": length}
            found = {"perplexity": value, "perplexity_error": error, "text": text}
        if args.tasks:
            found["tasks"] = evaluate_tasks(
                pruner.model,
                pruner.tokenizer,
                [name.strip() for name in args.tasks.split(",") if name.strip()],
                include=args.include_path,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                batch_size=args.batch_size,
                sequence_length=args.sequence_length,
            )
        return Measured(name_of(model), zeros / size, size, **found)


def describe(result) -> str:
    """The measurements of one model, line by line."""
    lines = []
    if result.perplexity is not None:
        error = "" if result.perplexity_error is None else f" ± {result.perplexity_error:.3f}"
        text = result.text
        lines.append(
            f"perplexity  {result.perplexity:.3f}{error}  on {text['dataset']}, {text['windows']} windows of "
            f"{text['sequence_length']} tokens"
        )
    for task, metrics in result.tasks.items():
        for metric, found in metrics.items():
            error = "" if found["error"] is None else f" ± {found['error']:.4f}"
            lines.append(f"{task}  {metric} {found['value']:.4f}{error}")
    lines.append(f"sparsity    {result.sparsity:.4f}  of {result.size:,} prunable weights")
    return "\n".join(lines)
