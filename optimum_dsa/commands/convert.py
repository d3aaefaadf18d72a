"""`optimum-cli dsa convert`."""

from __future__ import annotations

from .base import LeafCommand


class ConvertCommand(LeafCommand):
    """A checkpoint in its other form."""

    DESCRIPTION = """\
Store a pruned checkpoint without its zeros, or with them again, shard by shard and without loading the model. Every
weight stays bit for bit the same.

dense       loads everywhere, with or without this package
compressed  a bit per weight and the kept weights: smaller, loads with transformers after `import optimum_dsa`
"""
    EXAMPLES = """\
  optimum-cli dsa convert out out-compressed --to compressed
  optimum-cli dsa convert out-compressed out-dense --to dense
"""

    @staticmethod
    def parse_args(parser):
        ConvertCommand.describe(parser, "convert")
        parser.add_argument("model", help="folder or Hub id of the checkpoint")
        parser.add_argument("output", help="folder to write; an earlier result there is replaced")
        parser.add_argument("--to", required=True, help="what to write: dense or compressed")
        parser.add_argument("--revision", help="branch, tag or commit of a Hub model")

    def execute(self) -> dict:
        from ..checkpoint.convert import convert
        from ..checkpoint.load import local_folder

        folder = local_folder(self.args.model, self.args.revision)
        before, after = convert(folder, self.args.output, self.args.to)
        self.saved = True
        print(f"saved to {self.args.output}: {before:,} bytes of weights before, {after:,} now ({after / before:.1%})")
        return {"output": self.args.output, "bytes_before": before, "bytes": after}
