"""`optimum-cli dsa prune`."""

from __future__ import annotations

from .base import LeafCommand, add_bos_option, add_loading_options, check_texts, loading_options, say


class PruneCommand(LeafCommand):
    """A model in, an ordinary checkpoint with zeros out."""

    DESCRIPTION = """\
Prune a transformers model to an exact budget, in one shot, and save it as an ordinary checkpoint.

method      how weights are scored and what happens to the rest
              magnitude      |W|, needs no data
              wanda          |W| times the norm of its input, per row (default)
              wanda_variant  the same, rows may differ
              ria            relative importance and activations
              sparsegpt      second order, and the kept weights make up for the removed ones
allocation  how much to remove from each block
              uniform, dsa (default), owl, dlp, dlp_median, er, er_plus, global, alphapruning, atp, lsa;
              an allocation function such as "abslog/var/atan,asin/no_op@+0.08";
              an allocation as JSON, or the folder of a pruned model
pattern     row, matrix, group:128, 2:4 (any N:M), mixed:8 (N:8, N from the allocation)
"""
    EXAMPLES = """\
  optimum-cli dsa prune Qwen/Qwen3-0.6B -o out --sparsity 0.6
  optimum-cli dsa prune ./model -o out -s 0.7 --method sparsegpt --allocation owl --dataset calibration.txt
  optimum-cli dsa prune ./model -o out -s 0.5 --pattern 2:4 --allocation uniform
  optimum-cli dsa prune ./model -o out -s 0.5 --method magnitude --allocation uniform --device-map disk
"""

    @staticmethod
    def parse_args(parser):
        PruneCommand.describe(parser, "prune")
        parser.add_argument("model", help="folder or Hub id of the model to prune")
        parser.add_argument(
            "-o", "--output", required=True, help="folder to write; an earlier result there is replaced"
        )
        what = parser.add_argument_group("what to remove")
        what.add_argument("-s", "--sparsity", type=float, help="share of the prunable weights to remove, in [0, 1)")
        what.add_argument("--method", help="see above (default: wanda)")
        what.add_argument("--allocation", help="see above (default: dsa)")
        what.add_argument("--spread", type=float, help="half the distance between most and least pruned block")
        what.add_argument("--pattern", help="see above (default: the method's)")
        what.add_argument("--update", help="none or sparsegpt (default: the method's)")
        what.add_argument("--granularity", help="one sparsity per block (default), matrix, or block:kind")
        what.add_argument("--metric", help="what scores weights (default: the method's)")
        what.add_argument("--allocation-metric", help="what the allocation is computed from (default: wanda)")
        what.add_argument("--min-sparsity", type=float, help="least that a unit is pruned (default: 0)")
        what.add_argument("--max-sparsity", type=float, help="most that a unit is pruned (default: 0.99)")
        what.add_argument("--damping", type=float, help="added to X·Xᵀ, as a share of its mean (default: 0.01)")
        what.add_argument(
            "--true-sequential",
            action="store_true",
            default=None,
            help="calibrate later matrices of a block on the pruned earlier ones",
        )
        what.add_argument("--exclude", nargs="+", metavar="NAME", help="names or globs of weights to leave dense")
        what.add_argument("--include", nargs="+", metavar="NAME", help="matrices outside the blocks, such as lm_head")
        what.add_argument("--blocks", nargs="+", metavar="NAME", help="module lists to prune instead of those found")
        what.add_argument(
            "--skip-unprunable", action="store_true", default=None, help="leave dense what cannot be pruned"
        )
        what.add_argument("--config", help="dsa_config.json, or a folder with one, to start from")
        data = add_calibration_options(parser)
        data.add_argument(
            "--no-sequential",
            "--one-pass",
            dest="sequential",
            action="store_false",
            default=None,
            help="calibrate every block on dense inputs: half the time, worse results",
        )
        add_loading_options(parser)
        parser.add_argument("--max-shard-size", help="largest weight file, such as 2GB")
        parser.add_argument(
            "--compressed",
            action="store_true",
            help="store no zeros: smaller, and loads after import optimum_dsa only",
        )

    def execute(self) -> None:
        from shlex import quote

        from ..checkpoint.shard_size import check_shard_size
        from ..common.output import OutputFolder
        from ..model.parameters import weight_bytes
        from ..pruner import DSAPruner

        config = asked_config(self.args)
        options, loading = {}, loading_options(self.args)  # wrong ones end it here, before any work
        if self.args.max_shard_size is not None:
            check_shard_size(self.args.max_shard_size)
            options["max_shard_size"] = self.args.max_shard_size
        if config.resolved.reads | config.resolved.allocation_reads:
            check_texts(self.args, config.data)
        with OutputFolder(self.args.output) as output:
            pruner = DSAPruner.from_pretrained(self.args.model, **loading)
            output.require(weight_bytes(pruner.model))
            say(str(pruner.prune(self.args.dataset, config)))
            pruner.save_pretrained(output, self.args.compressed, **options)
        print(f"saved to {self.args.output}; next: optimum-cli dsa evaluate {quote(self.args.output)} --dataset FILE")


def add_calibration_options(parser):
    """The group of options that say which text feeds the statistics."""
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--dataset",
        default="wikitext2",
        help=".txt, .jsonl or .parquet file, or a dataset's name: wikitext2 (default), c4, a Hub id",
    )
    data.add_argument("--split", help="split of a named dataset (default: train)")
    data.add_argument("--text-column", help="column that holds the text (default: text)")
    data.add_argument("--num-samples", type=int, help="sequences to draw (default: 128)")
    data.add_argument("--sequence-length", type=int, help="tokens per sequence (default: the model's, max 2048)")
    add_bos_option(data)
    data.add_argument("--seed", type=int, help="which sequences are drawn (default: 0)")
    data.add_argument("--batch-size", type=int, help="sequences per forward pass (default: 8)")
    return data


def asked_config(args, **given):
    """The `DSAConfig` that the options ask for, on top of `given` and of `--config` where there is one."""
    from ..common.settings import nested, options_of
    from ..pruning.configuration import DSAConfig

    asked = {name: value for name in options_of(DSAConfig) if (value := getattr(args, name, None)) is not None}
    path = getattr(args, "config", None)
    base = DSAConfig.from_pretrained(path).to_dict() if path else {}
    if "sparsity" not in base | asked:
        raise ValueError("say how much to remove, for example --sparsity 0.6")
    return DSAConfig.from_dict(nested(DSAConfig, given | base | asked))
