"""`optimum-cli dsa search`."""

from __future__ import annotations

from .base import (
    LeafCommand,
    add_loading_options,
    asked_source,
    check_texts,
    check_weights,
    loading_options,
    say,
)
from .options import CommandParser, add_alternative, add_settings, as_given, taken
from .processes import TOGETHER
from .prune import (
    CALIBRATION,
    PruneCommand,
    add_calibration_options,
    add_quality_option,
    asked_config,
    asked_structures,
)


# of one run, or what was found
NOT_HANDED_ON = ("output", "resume", "allocation", "json", "quiet", "verbose", "config", "print_config")


class SearchCommand(LeafCommand):
    """A model and a sparsity in, an allocation out."""

    processes = TOGETHER

    DESCRIPTION = """\
Find the allocation that hurts a model least at a given sparsity, on validation text. Nothing is pruned; the result is
a folder that `optimum-cli dsa prune --allocation FOLDER` takes.

strategy    named         uniform and every named allocator
            random        functions drawn at random
            exhaustive    all distinct allocations of the published space
            ramp          the width of a linear ramp over depth
            evolution     functions bred from the best
            level_switch  budget moved between matrices at random, what helps is kept
            descent       budget moved between matrices along the loss's slope
            curves        budget moved by the loss's slope and each matrix's error curve
            auto          named, ramp, evolution, then descent (default)
            symbolic      metrics, bred as expressions of weight, input norm and gradient, at one allocation
            joint         such a metric and an allocation function together
            optishear     a metric's form and the ratios of blocks, by NSGA-III

What a metric was found with is in the folder too, and `prune` takes both from it.
With --structures it finds how many structures each block keeps (all strategies but exhaustive, curves and the last
three).
"""
    EXAMPLES = """\
  optimum-cli dsa search Qwen/Qwen3-0.6B -o found --sparsity 0.7
  optimum-cli dsa search ./model -o found -s 0.7 --dataset cal.txt --validation val.txt --budget "10 min"
  optimum-cli dsa search ./model -o found -s 0.7 --dataset cal.txt --validation val.txt --budget "10 min" --resume
  optimum-cli dsa search ./model -o found -s 0.7 --method alps --targets dense --true-sequential --residual
  optimum-cli dsa prune ./model -o out -s 0.7 --allocation found
  optimum-cli dsa search ./model -o found -s 0.7 --dataset cal.txt --validation val.txt --strategy joint
  optimum-cli dsa search ./model -o widths -s 0.2 --structures ffn,kv_group --importance obs
"""

    @staticmethod
    def parse_args(parser):
        SearchCommand.describe(parser, "search")
        parser.add_argument("model", help="folder or Hub id of the model")
        parser.add_argument("-o", "--output", required=True, help="folder for the trace and the result")
        parser.add_argument("--strategy", default="auto", help="see above (default: %(default)s)")
        parser.add_argument(
            "--budget",
            default="2M tokens",
            help="'500k tokens', '300 evaluations', '10 min', ... (default: %(default)s)",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="go on with the search in the output folder; the same model, texts and options are needed",
        )
        parser.add_argument(
            "--seeds", type=int, default=1, help="repeat with so many seeds and compare what each finds (default: 1)"
        )
        parser.add_argument("--report-to", help="log trials to trackio, tensorboard, wandb, ... (default: none)")
        parser.add_argument(
            "--at", help="allocation at which symbolic compares metrics: name, function, folder (default: uniform)"
        )
        what = parser.add_argument_group("how the model will be pruned")
        add_quality_option(what)
        data = add_calibration_options(parser)
        found = ("allocation", "spread", "granularity", "overrides")  # is what is searched
        found += ("image_column", "packing")  # candidates are compared on windows of text
        add_settings(parser, [(data, CALIBRATION)], "pruning.configuration.DSAConfig", what, without=found)
        cut = parser.add_argument_group("structures instead of weights (--structures)")
        found += ("unstable", "budgets")  # says it otherwise
        found += ("learner", "learn_steps", "learn_rate", "learn_prompt")  # learns it
        found += ("max_loss",)  # finds how much goes, and a search from where
        add_alternative(parser, "structures", "pruning.structured.configuration.DSAStructuredConfig", cut, found)
        parser.add_argument(
            "--validation", help="text to compare candidates on (default: other windows of the calibration data)"
        )
        add_loading_options(parser)

    def execute(self) -> dict | None:
        from contextlib import ExitStack
        from dataclasses import replace
        from pathlib import Path
        from shlex import quote

        from ..common.output import OutputFolder
        from ..common.ranks import current_ranks
        from ..pruner import DSAPruner
        from ..search.prepared import check_search, realisation_of
        from ..search.problem import parse_budget
        from ..search.result import RESULT_FILES, robustness_table
        from ..search.strategies import STRATEGIES
        from ..sharing.pictures import plot_search

        args = self.args
        # Blocks differ, and how is what is searched for.
        config = asked_structures(args, self.parser, layout="per_layer") or asked_config(
            args, allocation=args.at or "uniform"
        )
        if args.at is not None and not STRATEGIES.fact(args.strategy, "fixed"):
            raise ValueError(
                f"--at is of strategy symbolic, and {args.strategy!r} looks for an allocation; leave out one of both."
            )
        check_search(config)
        realisation_of(config, args.strategy, None)
        config.reconstruct.check_place(args.device_map == "disk")  # of the prune that it searches for
        parse_budget(args.budget)
        loading = loading_options(args)
        check_texts(args, config.data)
        check_weights(args, loading)
        if args.seeds < 1:
            raise ValueError(f"--seeds is a number of searches, at least 1, got {args.seeds}.")
        if current_ranks().is_first:
            with OutputFolder(args.output, RESULT_FILES):
                pass  # found before the model is loaded: what cannot or must not be written
        pruner = DSAPruner.from_pretrained(args.model, **loading)
        output, several = Path(args.output), args.seeds > 1
        with ExitStack() as stack:
            if several and current_ranks().is_first:
                whole = stack.enter_context(OutputFolder(output, RESULT_FILES))
            results = []
            for seed in range(config.data.seed, config.data.seed + args.seeds):
                results.append(
                    pruner.search(
                        asked_source(args),
                        replace(config, data=replace(config.data, seed=seed)),
                        args.strategy,
                        args.budget,
                        args.validation,
                        output / f"seed-{seed}" if several else output,
                        args.resume,
                        args.report_to,
                    )
                )
                if current_ranks().is_first:
                    say(str(results[-1]))
            if not current_ranks().is_first:
                return None
            if several:
                say(f"\n{robustness_table(results)}")
                min(results, key=lambda result: result.finalists[0].loss).save(whole, plot_search)
        self.saved = True
        best = min(results, key=lambda result: result.finalists[0].loss)
        if several:
            args.seed = best.config.data.seed
        # The allocation was found under all these, and is for them.
        if args.structures:
            args.layout = config.layout
        parser = CommandParser()
        PruneCommand.parse_args(parser)
        options = as_given(args, parser, taken(parser, without=NOT_HANDED_ON))
        print(
            f"saved to {output}; next: optimum-cli dsa prune {quote(args.model)} -o OUT{options} --allocation "
            f"{quote(str(output))}"
        )
        return {"output": str(output), **best.to_dict()}

    def left_behind(self) -> str:
        from pathlib import Path

        if not any(Path(self.args.output).glob("**/trace.jsonl")):
            return "nothing was written"
        return f"what was tried is in {self.args.output}; the same command with --resume goes on"
