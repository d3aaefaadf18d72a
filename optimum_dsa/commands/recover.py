"""`optimum-cli dsa recover`."""

from __future__ import annotations

from .base import (
    LeafCommand,
    add_loading_options,
    add_source_options,
    asked_source,
    check_texts,
    check_weights,
    loading_options,
    say,
)
from .options import add_settings, asked_settings, evaluate_options
from .processes import OWN, check_placed


class RecoverCommand(LeafCommand):
    """A pruned model in, one with the same or as many zeros and a lower perplexity out."""

    processes = OWN

    DESCRIPTION = """\
Train a pruned model, on language modelling or towards its dense parent's predictions, and keep every zero; or train
under a budget of zeros, a dense model as well.

method  sparse-lora  adapters on the pruned matrices, merged at the end (default)
        full         all weights that are not zero
        elsa         all weights; which become zero is chosen on the way, how many is the pruned model's budget, or
                     for a dense model --sparsity, --allocation and --pattern
mode    what the adapters add to a weight W, with small factors A and B
          mask       BA where W is not zero (default)
          scale      what makes it W times BA, entry by entry
          spp        W times a factor per row and one per column
          grouped    one number for every row and 32 columns (--group-size), as grids with offsets can take in
"""
    EXAMPLES = """\
  optimum-cli dsa recover out -o better --dataset wikitext2 --steps 1000
  optimum-cli dsa recover out -o better --dataset train.txt --validation val.txt --method full --patience 3
  optimum-cli dsa recover out -o better --dataset train.txt --teacher Qwen/Qwen3-0.6B --distillation 0.5
  optimum-cli dsa recover out -o better --dataset train.txt --save-steps 100 --resume
  optimum-cli dsa recover Qwen/Qwen3-0.6B -o out --dataset train.txt --method elsa --sparsity 0.8
  torchrun --nproc_per_node 8 -m optimum_dsa recover out -o better --dataset train.txt --sharding fsdp
"""

    @staticmethod
    def parse_args(parser):
        RecoverCommand.describe(parser, "recover")
        parser.add_argument(
            "model", help="folder or Hub id of the pruned model; with --method elsa also of a dense one"
        )
        parser.add_argument(
            "-o", "--output", required=True, help="folder to write; an earlier result there is replaced"
        )
        how = parser.add_argument_group("training")
        how.add_argument("--teacher", help="the dense model, to learn its predictions (--distillation 0.5)")
        data = parser.add_argument_group("text")
        add_source_options(data, required=True)
        data.add_argument("--validation", help="as --dataset, once (default: the end of it)")
        run = parser.add_argument_group("stopping and going on")
        run.add_argument("--checkpoints", help="their folder (default: beside OUTPUT, hidden, removed at the end)")
        run.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        several = parser.add_argument_group("several processes (torchrun)")
        elsa = parser.add_argument_group("training under a budget (--method elsa)")
        budget = ("sparsity", "allocation", "pattern", "penalty", "project_every", "growth", "shape")
        groups = [
            (elsa, budget),
            (data, ("data", "validation_windows")),
            (run, ("eval_steps", "patience", "save_steps")),
            (several, ("sharding",)),
        ]
        pictures = ("image_column", "packing")  # training reads text in windows
        add_settings(parser, groups, "recovery.configuration.RecoveryConfig", how, without=pictures)
        add_loading_options(parser)

    _checkpoints = None  # their folder, once there is one

    def left_behind(self) -> str:
        from pathlib import Path

        if self._checkpoints is None or not any(Path(self._checkpoints).glob("checkpoint-*")):
            return "nothing was written"
        return f"checkpoints are in {self._checkpoints}; the same command with --resume goes on"

    def execute(self) -> dict | None:
        from contextlib import nullcontext
        from pathlib import Path
        from shlex import quote

        from ..checkpoint.description import base_files_in
        from ..checkpoint.load import load_model
        from ..common.output import OutputFolder
        from ..common.settings import nested
        from ..model.parameters import weight_bytes
        from ..pruner import DSAPruner
        from ..recovery.configuration import RecoveryConfig
        from ..recovery.processes import check_divided, from_first, is_first
        from ..recovery.recover import check_trainable

        args = self.args
        asked = asked_settings(args, RecoveryConfig)
        if args.teacher and "distillation" not in asked:
            asked["distillation"] = 0.5
        config = RecoveryConfig(**nested(RecoveryConfig, asked))
        check_divided(config)
        loading = loading_options(args)
        check_trainable(args.device_map == "disk")
        check_placed(args.device_map)
        if args.teacher and Path(args.teacher).is_absolute() and not Path(args.teacher).exists():
            raise FileNotFoundError(f"No folder {args.teacher}, where the teacher would be.")
        output, model = Path(args.output), Path(args.model)
        if not config.merge and model.is_dir() and model.resolve() == output.resolve():
            raise ValueError(f"--keep-adapter needs another --output: {model} holds the weights under the adapter.")
        check_texts(args, config.data)
        check_weights(args, loading)
        # Of several processes the first alone writes.
        with OutputFolder(output, resume=args.resume) if is_first() else nullcontext() as place:
            self.place = place
            checkpoints = args.checkpoints
            if checkpoints is None and (config.save_steps is not None or args.resume):
                checkpoints = from_first(lambda: place.scratch("checkpoints"))
            self._checkpoints = checkpoints
            pruner = DSAPruner.from_pretrained(args.model, **loading)
            if place is not None:
                place.require(weight_bytes(pruner.model))
            teacher, source = args.teacher, asked_source(args)
            if teacher and args.trust_remote_code:
                teacher = load_model(teacher, trust_remote_code=True)
            result = pruner.recover(source, config, args.validation, teacher, checkpoints, args.resume)
            if place is None:
                return None
            say(str(result))
            pruner.save_pretrained(place)
        as_before = "" if config.sparsity is not None else " as before"
        kept = f"sparsity {pruner.report.sparsity:.4f}{as_before}"
        if pruner.report.structured is not None and not pruner.report.removed:
            kept = f"{pruner.report.parameters:,} parameters as before"
        print(
            f"saved to {args.output}, {kept}; "
            f"next: optimum-cli dsa evaluate {quote(args.output)}{evaluate_options(args, self.parser)}"
        )
        return {
            "output": args.output,
            "sparsity": pruner.report.sparsity,
            **result.to_dict(),
            **base_files_in(args.output),
        }
