"""`optimum-cli dsa demo`."""

from __future__ import annotations

from .base import LeafCommand


class DemoCommand(LeafCommand):
    """The embedded model, pruned and compared."""

    DESCRIPTION = """\
Prune the embedded model (a small Llama trained on Python's standard library) at 60 % by three named allocations, and
by one that a search of half a minute discovers; print their perplexity on sealed text, and save the last one. Needs no
network and takes under a minute.
"""

    @staticmethod
    def parse_args(parser):
        DemoCommand.describe(parser, "demo")
        parser.add_argument(
            "-o", "--output", default="tiny-llama-dsa-60", help="folder to write (default: %(default)s)"
        )
        parser.add_argument("-s", "--sparsity", type=float, default=0.6, help="share to remove (default: %(default)s)")
        parser.add_argument("--method", default="wanda", help="default: %(default)s")
        parser.add_argument("--budget", default="150k tokens", help="of the search (default: %(default)s)")

    def execute(self) -> dict:
        from .embedded import run_demo

        args = self.args
        facts = run_demo(args.output, args.sparsity, args.method, print, args.budget)
        self.saved = True
        return facts
