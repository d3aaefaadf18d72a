"""`optimum-cli dsa report`."""

from __future__ import annotations

from .base import LeafCommand, say


class ReportCommand(LeafCommand):
    """The folder of a pruned model or of a search in, a page out."""

    DESCRIPTION = """\
Show a pruned model, or a search: a table here, and report.html with its pictures in a folder. The page is one file
that needs no network.

A perplexity is in it where `optimum-cli dsa evaluate DIR --dataset FILE --json > DIR/evaluation.json` was run.
Needs matplotlib, which the extra `plots` brings.
"""
    EXAMPLES = """\
  optimum-cli dsa report out
  optimum-cli dsa report out --compare out-uniform out-owl -o report
  optimum-cli dsa report found
"""

    @staticmethod
    def parse_args(parser):
        ReportCommand.describe(parser, "report")
        parser.add_argument("folder", help="folder of a pruned model or of a search")
        parser.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="more folders, to show beside it")
        parser.add_argument("-o", "--output", help="folder for report.html and the pictures (default: the first one)")

    def execute(self) -> None:
        from pathlib import Path

        try:
            from ..sharing.page import write_report

            say(write_report(self.args.folder, self.args.compare, self.args.output))
        except ImportError as error:
            raise ValueError(str(error)) from None
        print(f"\nsaved to {Path(self.args.output or self.args.folder) / 'report.html'}")
