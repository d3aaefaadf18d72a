"""`optimum-cli dsa evaluate`."""

from __future__ import annotations

from .base import LeafCommand, add_loading_options, loading_options


class EvaluateCommand(LeafCommand):
    """Perplexity and sparsity of a checkpoint."""

    DESCRIPTION = "Measure a model's perplexity on a text (non-overlapping windows) and count its zeros."
    EXAMPLES = """\
  optimum-cli dsa evaluate out --dataset test.txt
  optimum-cli dsa evaluate out --dataset wikitext2 --sequence-length 2048 --json
"""

    @staticmethod
    def parse_args(parser):
        EvaluateCommand.describe(parser, "evaluate")
        parser.add_argument("model", help="folder or Hub id")
        parser.add_argument("--dataset", required=True, help=".txt, .jsonl or .parquet file, or a dataset's name")
        parser.add_argument("--split", default="test", help="split of a named dataset (default: %(default)s)")
        parser.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
        parser.add_argument("--sequence-length", type=int, help="tokens per window (default: the model's, max 2048)")
        parser.add_argument("--num-samples", type=int, help="use this many windows, drawn by --seed (default: all)")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--batch-size", type=int, default=8)
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        add_loading_options(parser)

    def execute(self) -> None:
        import json

        from ..architecture import find_architecture
        from ..calibration import walk_blocks
        from ..data import default_length, describe, load_tokens
        from ..evaluation import perplexity
        from ..pruner import DSAPruner

        args = self.args
        for name in ("sequence_length", "num_samples", "batch_size"):
            if getattr(args, name) is not None and getattr(args, name) < (2 if name == "sequence_length" else 1):
                raise ValueError(f"--{name.replace('_', '-')} is too small: {getattr(args, name)}.")
        pruner = DSAPruner.from_pretrained(args.model, **loading_options(args))
        if pruner.tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer, so its text cannot be read.")
        length = args.sequence_length or default_length(pruner.model)
        tokens = load_tokens(
            args.dataset,
            pruner.tokenizer,
            num_samples=args.num_samples,
            sequence_length=length,
            seed=args.seed,
            text_column=args.text_column,
            split=args.split,
        )
        zeros = size = 0
        for walked in walk_blocks(pruner.model, find_architecture(pruner.model, skip_unprunable=True), None):
            for weight in walked.weights:
                zeros += int((walked.tensor(weight) == 0).sum())
                size += weight.size
        result = {
            "model": describe(args.model),
            "dataset": describe(args.dataset),
            "windows": len(tokens),
            "sequence_length": length,
            "perplexity": perplexity(pruner.model, tokens, args.batch_size),
            "sparsity": zeros / size,
        }
        if args.json:
            print(json.dumps(result))
            return
        print(
            f"perplexity  {result['perplexity']:.3f}  on {result['dataset']}, {len(tokens)} windows of {length} tokens"
        )
        print(f"sparsity    {result['sparsity']:.4f}  of {size:,} prunable weights")
