"""`optimum-cli dsa bench`."""

from __future__ import annotations

from .actions import Names
from .base import LeafCommand, add_kernels_option, add_loading_options, allow_kernels, loading_options, say


class BenchCommand(LeafCommand):
    """How fast a model is, alone or beside another."""

    DESCRIPTION = """\
Measure how many tokens a second a causal model reads and writes, and say what it takes: memory, files, and how much is
read for a token beside what this machine's memory gives, which is measured in the same run. With --against another
model is measured in turn with it, in one process, and the ratios are of the fastest rounds: what pruning, storing or
cutting has brought. Zeros that are multiplied as any other number make nothing faster.
"""
    EXAMPLES = """\
  optimum-cli dsa bench smaller --against ./model
  optimum-cli dsa bench out --forms packed,dense --dtype bfloat16
  optimum-cli dsa bench smaller --against ./model --dtype bfloat16 --threads 1 --prompt 128 --json
  optimum-cli dsa bench smaller --against ./model --output smaller/speed.json
"""

    @staticmethod
    def parse_args(parser):
        BenchCommand.describe(parser, "bench")
        parser.add_argument("model", help="folder or Hub id of the model")
        parser.add_argument("--against", metavar="MODEL", help="folder or Hub id of what it is held against")
        parser.add_argument(
            "--forms",
            nargs="+",
            action=Names,
            default=[],
            metavar="FORM",
            help="ways to hold its matrices, a row each: packed, packed-int8, dense (default: as it is stored)",
        )
        parser.add_argument("--prompt", type=int, default=512, help="tokens that are read (default: 512)")
        parser.add_argument("--new-tokens", type=int, default=64, help="tokens that are written then (default: 64)")
        parser.add_argument("--batch-size", type=int, default=1, help="sequences at a time (default: 1)")
        parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts (default: 5)")
        parser.add_argument("--threads", type=int, help="of PyTorch, on a CPU (default: as many as it takes)")
        parser.add_argument("--seed", type=int, default=0, help="of the tokens that are read (default: 0)")
        parser.add_argument("--output", help="JSON file to write to; in the model's folder, report and card show it")
        add_kernels_option(parser)
        add_loading_options(parser, reads_text=False)

    def execute(self) -> dict:
        from dataclasses import replace
        from functools import partial

        import torch

        from ..checkpoint.load import file_bytes, load_model
        from ..checkpoint.running import FORMS, load_as
        from ..evaluation.speed import measure_speed
        from ..evaluation.speed_result import check_speed_file, save_speed

        args = self.args
        allow_kernels(args)
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads is a whole number of at least 1, got {args.threads}.")
            torch.set_num_threads(args.threads)
        if args.against == args.model:
            raise ValueError(f"--against {args.against} is the model itself; name another, or leave it out.")
        if args.output:
            check_speed_file(args.output)
        options = loading_options(args)
        names = [args.model, *([args.against] if args.against else [])]
        forms = list(dict.fromkeys(args.forms))
        for form in forms:
            FORMS[form]
        rows = [(args.model, form) for form in forms or [""]] + [(name, "") for name in names[1:]]
        models = {
            f"{name} ({form})" if form else name: partial(load_as, name, form, **options)
            if form
            else partial(load_model, name, **options)
            for name, form in rows
        }
        numbers = ("prompt", "new_tokens", "batch_size", "rounds", "seed")
        found = measure_speed(models, **{name: getattr(args, name) for name in numbers})
        sizes = {name: file_bytes(name, options) for name in names}
        speeds = {
            key: replace(speed, model=name, form=form, file_bytes=sizes[name])
            for (key, speed), (name, form) in zip(found.speeds.items(), rows)
        }
        found = replace(found, speeds=speeds)
        say(str(found))
        if args.output:
            save_speed(args.output, found)
            self.saved = True
        return found.to_dict()
