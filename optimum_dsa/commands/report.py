"""`optimum-cli dsa report`."""

from __future__ import annotations

from .base import LeafCommand, say


class ReportCommand(LeafCommand):
    """The folder of a pruned model or of a search in, a page out."""

    DESCRIPTION = """\
Show a model, or a search: a table here, and report.html with its pictures in a folder. The page is one file
that needs no network.

Perplexities and tasks are in it where optimum-cli dsa evaluate DIR --dense MODEL --dataset FILE --output
DIR/evaluation.json was run, the dense model's beside them.
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
        parser.add_argument("folder", help="folder of a model or of a search")
        parser.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="more folders, to show beside it")
        parser.add_argument("-o", "--output", help="folder for report.html and the pictures (default: the first one)")

    def execute(self) -> dict:
        from pathlib import Path

        try:
            from ..sharing.outcome import read_all
            from ..sharing.page import write_report
            from ..sharing.tables import result_tables

            args = self.args
            say(write_report(args.folder, args.compare, args.output))
            tables = result_tables(read_all([args.folder, *args.compare]))
        except ImportError as error:
            raise ValueError(str(error)) from None
        page = Path(args.output or args.folder) / "report.html"
        print(f"\nsaved to {page}")
        named = [
            {"title": heading, "caption": caption, "rows": [dict(zip(table.header, row)) for row in table.rows]}
            for heading, caption, table in tables
        ]
        return {"page": str(page), "tables": named}
