"""`optimum-cli dsa plan`."""

from __future__ import annotations

from .base import LeafCommand, add_loading_options, loading_options, say
from .options import add_settings
from .prune import CALIBRATION, add_calibration_options, add_quality_option, asked_config


class PlanCommand(LeafCommand):
    """A model and the options of prune in, what that will need out."""

    DESCRIPTION = """\
Say what pruning a model will need, before it is loaded: memory part by part, disk, time, and the first change that
helps where it does not fit. Takes the options of prune. Nothing is loaded and nothing written: sizes come from the
model's config.json, and the time from one block of such sizes, with random weights, pruned on one or two windows.
"""
    EXAMPLES = """\
  optimum-cli dsa plan Qwen/Qwen3-0.6B --sparsity 0.6 --quality good
  optimum-cli dsa plan ./model -s 0.7 --method sparsegpt --num-samples 64 --no-run
  optimum-cli dsa plan ./model -s 0.7 --quality best --device-map disk --json
  optimum-cli dsa plan config.json -s 0.5 --method sparsegpt --ranks 8 --device-memory 80GB
"""

    @staticmethod
    def parse_args(parser):
        PlanCommand.describe(parser, "plan")
        parser.add_argument("model", help="folder or Hub id of the model; its config.json is enough, also alone")
        parser.add_argument(
            "-o", "--output", default=".", help="where the result will go (default: the working folder)"
        )
        parser.add_argument(
            "--no-run", action="store_true", help="run no block: the time is arithmetic, too, and known at once"
        )
        spread = parser.add_argument_group("where it will run")
        spread.add_argument(
            "--ranks", type=int, default=1, help="processes that share the calibration text (default: 1)"
        )
        spread.add_argument(
            "--devices", type=int, default=1, help="GPUs that each of them spreads the model over (default: 1)"
        )
        spread.add_argument(
            "--device-memory", help="memory of a device that is not here, such as 80GB; then no time is told"
        )
        what = parser.add_argument_group("what to remove")
        add_quality_option(what)
        data = add_calibration_options(parser)
        add_settings(parser, [(data, CALIBRATION)], "pruning.configuration.DSAConfig", what)
        add_loading_options(parser)

    def execute(self) -> dict:
        from ..checkpoint.plan import plan
        from ..common.machine import bytes_in

        args = self.args
        config = asked_config(args)
        spread = {"ranks": args.ranks, "devices": args.devices}
        if args.device_memory is not None:
            spread["device_memory"] = bytes_in(args.device_memory)
        asked = {"output": args.output, "run_block": not args.no_run, **spread, **loading_options(args)}
        found = plan(args.model, config, **asked)
        say(str(found))
        return {"model": args.model, **found.to_dict()}
