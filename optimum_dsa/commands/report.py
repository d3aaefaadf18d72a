"""`optimum-cli dsa report`."""

from __future__ import annotations

from .base import LeafCommand, add_loading_options, asked_source, check_texts, loading_options, say
from .options import add_settings, asked_settings
from .prune import CALIBRATION, add_calibration_options, asked_config


# Settings of an allocation: error curves are of every matrix, at sparsities of their own.
WITHOUT = ("sparsity", "allocation", "spread", "granularity", "min_sparsity", "max_sparsity", "allocation_metric")
WITHOUT += ("overrides", "reconstruct", "rate", "span", "apart", "distill", "permute")  # what is done to whole blocks
WITHOUT += ("values", "group", "scales", "feedback")
FILES = ("sensitivity.json", "sensitivity.png")


class ReportCommand(LeafCommand):
    """The folder of a pruned model or of a search in, a page out; or of any model, how its matrices bear pruning."""

    DESCRIPTION = """\
Show a model, or a search: a table here, and report.html with its pictures in a folder. The page is one file
that needs no network.

Perplexities and tasks are in it where optimum-cli dsa evaluate DIR --dense MODEL --dataset FILE --output
DIR/evaluation.json was run, the dense model's beside them.

With --sensitivity, of a model that is yet to be pruned: the share of its output that every matrix loses under a
method at 30 to 90 %, as sensitivity.json and sensitivity.png.
Needs matplotlib, which the extra `plots` brings.
"""
    EXAMPLES = """\
  optimum-cli dsa report out
  optimum-cli dsa report out --compare out-uniform out-owl -o report
  optimum-cli dsa report found
  optimum-cli dsa report ./model --sensitivity --method alps --dataset calibration.txt -o curves
"""

    @staticmethod
    def parse_args(parser):
        ReportCommand.describe(parser, "report")
        parser.add_argument("folder", help="folder of a model or of a search; with --sensitivity also a Hub id")
        parser.add_argument("--compare", nargs="+", default=[], metavar="DIR", help="more folders, to show beside it")
        parser.add_argument("-o", "--output", help="folder for report.html and the pictures (default: the first one)")
        parser.add_argument(
            "--sensitivity",
            action="store_true",
            help="error curves of all matrices instead; options below are its",
        )
        what = parser.add_argument_group("how the matrices are pruned, with --sensitivity")
        data = add_calibration_options(parser)
        add_settings(parser, [(data, CALIBRATION)], "pruning.configuration.DSAConfig", what, without=WITHOUT)
        add_loading_options(parser)

    def has_settings(self) -> bool:
        return self.args.sensitivity

    def execute(self) -> dict:
        return self._sensitivity() if self.args.sensitivity else self._report()

    def _report(self) -> dict:
        from ..common.settings import flag_of
        from ..pruning.configuration import DSAConfig

        if asked := asked_settings(self.args, DSAConfig):
            raise ValueError(
                f"{flag_of(next(iter(asked)))} is for --sensitivity, which was not asked for; leave it out."
            )
        from pathlib import Path

        try:
            from ..sharing.outcome import read_all
            from ..sharing.page import write_report
            from ..sharing.tables import result_tables

            args = self.args
            table = write_report(args.folder, args.compare, args.output)
            self.saved = True
            say(table)
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

    def _sensitivity(self) -> dict:
        from ..common.columns import columns
        from ..common.output import OutputFolder
        from ..pruner import DSAPruner
        from ..sharing.drawing import require_matplotlib
        from ..sharing.pictures import plot_sensitivity

        args = self.args
        config, loading = asked_config(args, sparsity=0.5, allocation="uniform"), loading_options(args)
        if not args.output:
            raise ValueError("--sensitivity writes beside no model; say where with -o FOLDER.")
        if config.resolved.reads | config.resolved.metric_reads:
            check_texts(args, config.data)
        try:
            require_matplotlib()
        except ImportError as error:
            raise ValueError(str(error)) from None
        with OutputFolder(args.output, FILES) as output:
            self.place = output
            found = DSAPruner.from_pretrained(args.folder, **loading).sensitivity(asked_source(args), config)

            def fill(place) -> None:
                found.save(place / FILES[0])
                plot_sensitivity(found).savefig(place / FILES[1], dpi=200)

            output.write(fill)
        rows = [("output lost at", *(f"{level:.0%}" for level in found.levels))]
        for units in (found.by_block(), found.by_kind()):
            rows += [(name, *(f"{error:.4f}" for error in errors)) for name, errors in units.items()]
        say("\n".join(columns(rows)))
        print(f"\nsaved to {args.output}")
        return {"output": args.output, **found.to_dict()}
