"""`optimum-cli dsa recover`."""

from __future__ import annotations

from .base import LeafCommand, add_bos_option, add_loading_options, check_texts, loading_options, say


class RecoverCommand(LeafCommand):
    """A pruned model in, one with the same zeros and a lower perplexity out."""

    DESCRIPTION = """\
Train a pruned model, on language modelling or towards its dense parent's predictions, and keep every zero.

method  sparse-lora  adapters on the pruned matrices, merged at the end (default)
        full         all weights that are not zero
mode    what the adapters add to a weight W, with small factors A and B
          mask       BA where W is not zero (default)
          scale      what makes it W times BA, entry by entry
          spp        W times a factor per row and one per column
"""
    EXAMPLES = """\
  optimum-cli dsa recover out -o better --dataset wikitext2 --steps 1000
  optimum-cli dsa recover out -o better --dataset train.txt --validation val.txt --method full --patience 3
  optimum-cli dsa recover out -o better --dataset train.txt --teacher Qwen/Qwen3-0.6B --distillation 0.5
  optimum-cli dsa recover out -o better --dataset train.txt --save-steps 100 --resume
"""

    @staticmethod
    def parse_args(parser):
        RecoverCommand.describe(parser, "recover")
        parser.add_argument("model", help="folder or Hub id of the pruned model")
        parser.add_argument(
            "-o", "--output", required=True, help="folder to write; an earlier result there is replaced"
        )
        how = parser.add_argument_group("training")
        how.add_argument("--method", help="see above (default: sparse-lora)")
        how.add_argument("--mode", help="see above (default: mask)")
        how.add_argument("--steps", type=int, help="optimizer steps (default: 300)")
        how.add_argument("--learning-rate", type=float, help="default: 1e-3, 4e-3 for spp, 3e-4 for full")
        how.add_argument("--weight-decay", type=float, help="AdamW's (default: 0)")
        how.add_argument("--batch-size", type=int, help="sequences per forward pass (default: 8)")
        how.add_argument("--accumulation", type=int, help="forward passes per step (default: 1)")
        how.add_argument("--rank", type=int, help="of the adapters, on average (default: 16)")
        how.add_argument("--alpha", type=float, help="of the adapters (default: twice the rank)")
        how.add_argument("--ranks", help="allocation: more where more was pruned (default); uniform")
        how.add_argument("--keep-adapter", action="store_true", help="save the adapter instead of a merged model")
        how.add_argument("--teacher", help="the dense model, to learn its predictions")
        how.add_argument("--distillation", type=float, help="weight of the teacher's, in (0, 1] (default: 0.5)")
        how.add_argument("--temperature", type=float, help="softens the predictions compared (default: 1)")
        how.add_argument("--bf16", action="store_true", default=None, help="multiply in bfloat16")
        how.add_argument("--gradient-checkpointing", action="store_true", default=None, help="less memory, more time")
        data = parser.add_argument_group("text")
        data.add_argument("--dataset", required=True, help=".txt, .jsonl or .parquet file, or a dataset's name")
        data.add_argument("--validation", help="as --dataset (default: the end of it)")
        data.add_argument("--validation-windows", type=int, help="windows to validate on (default: 32)")
        data.add_argument("--split", help="split of a named dataset (default: train)")
        data.add_argument("--text-column", help="column that holds the text (default: text)")
        data.add_argument("--sequence-length", type=int, help="tokens per sequence (default: the model's, max 2048)")
        add_bos_option(data)
        data.add_argument("--seed", type=int, help="order of the text, start of the adapters (default: 0)")
        run = parser.add_argument_group("stopping and going on")
        run.add_argument("--eval-steps", type=int, help="steps between validations (default: 50)")
        run.add_argument("--patience", type=int, help="stop after so many validations without a new best")
        run.add_argument("--save-steps", type=int, help="steps between checkpoints (default: none)")
        run.add_argument("--checkpoints", help="their folder (default: beside OUTPUT, hidden, removed at the end)")
        run.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        add_loading_options(parser)

    def execute(self) -> None:
        from pathlib import Path
        from shlex import quote

        from ..common.output import OutputFolder
        from ..common.settings import nested, options_of
        from ..model.parameters import weight_bytes
        from ..pruner import DSAPruner
        from ..recovery.configuration import RecoveryConfig

        args = self.args
        asked = {
            name: value for name in options_of(RecoveryConfig) if (value := getattr(args, name, None)) is not None
        }
        if args.teacher and "distillation" not in asked:
            asked["distillation"] = 0.5
        config = RecoveryConfig(**nested(RecoveryConfig, asked), merge=not args.keep_adapter)
        loading = loading_options(args)
        if args.teacher and Path(args.teacher).is_absolute() and not Path(args.teacher).is_dir():
            raise FileNotFoundError(f"No folder {args.teacher}, where the teacher would be.")
        output, model = Path(args.output), Path(args.model)
        if args.keep_adapter and model.is_dir() and model.resolve() == output.resolve():
            raise ValueError(f"--keep-adapter needs another --output: {model} holds the weights under the adapter.")
        loading = loading_options(args)
        check_texts(args, config.data)
        with OutputFolder(output, resume=args.resume) as place:
            checkpoints = args.checkpoints
            if checkpoints is None and (config.save_steps is not None or args.resume):
                checkpoints = place.scratch("checkpoints")
            pruner = DSAPruner.from_pretrained(args.model, **loading)
            place.require(weight_bytes(pruner.model))
            result = pruner.recover(args.dataset, config, args.validation, args.teacher, checkpoints, args.resume)
            say(str(result))
            pruner.save_pretrained(place)
        print(
            f"saved to {args.output}, sparsity {pruner.report.sparsity:.4f} as before; next: optimum-cli dsa evaluate "
            f"{quote(args.output)} --dataset FILE"
        )
