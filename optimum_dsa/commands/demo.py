"""`optimum-cli dsa demo`."""

from __future__ import annotations

from .base import LeafCommand


class DemoCommand(LeafCommand):
    """The embedded model, pruned and compared."""

    DESCRIPTION = """\
Prune the embedded model (a small Llama trained on Python's standard library) at 60 % with three allocations, print
their perplexity on sealed text, and save the one pruned with DSA. Needs no network and takes under a minute.
"""

    @staticmethod
    def parse_args(parser):
        DemoCommand.describe(parser, "demo")
        parser.add_argument(
            "-o", "--output", default="tiny-llama-dsa-60", help="folder to write (default: %(default)s)"
        )
        parser.add_argument("-s", "--sparsity", type=float, default=0.6, help="share to remove (default: %(default)s)")
        parser.add_argument("--method", default="wanda", help="default: %(default)s")

    def execute(self) -> None:
        from .embedded import run_demo

        run_demo(self.args.output, self.args.sparsity, self.args.method, print)
