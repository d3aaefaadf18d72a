"""`optimum-cli dsa quantize`."""

from __future__ import annotations

from .base import LeafCommand, say


class QuantizeCommand(LeafCommand):
    """A pruned checkpoint as whole numbers and scales, zeros kept."""

    DESCRIPTION = """\
Store the matrices of a checkpoint's blocks as whole numbers of 8 or 4 bits times scales, in a format of
compressed-tensors, which transformers loads where compressed-tensors is installed, and vLLM. Every zero stays a zero,
and what is kept stays other than zero: `verify` counts them. What lies on such a grid already, of a model pruned with
--values, stays bit for bit what it is. Embeddings, head, norms and routers stay as they are; what else cannot be
quantised is named.
"""
    EXAMPLES = """\
  optimum-cli dsa quantize out out-int4 --bits 4 --group 128
  optimum-cli dsa quantize out out-int8 --bits 8 --group 0
  optimum-cli dsa quantize out out-w8a8 --format int-quantized
"""

    @staticmethod
    def parse_args(parser):
        QuantizeCommand.describe(parser, "quantize")
        parser.add_argument("model", help="folder or Hub id of the checkpoint")
        parser.add_argument("output", help="folder to write; an earlier result there is replaced")
        parser.add_argument("--bits", type=int, help="of a number: 8 or 4 (default: 4; of int-quantized 8)")
        parser.add_argument(
            "--group",
            type=int,
            help="columns that share a scale, or 0 for all of a row (default: 128; of int-quantized 0)",
        )
        parser.add_argument(
            "--scales", default="mse", help="how they are chosen: mse, of least error (default), or absmax"
        )
        parser.add_argument(
            "--format",
            default="pack-quantized",
            help="of compressed-tensors: pack-quantized (default), weights alone; or int-quantized, int8 whose inputs "
            "are rounded to 8 bits, too, by who runs it",
        )
        parser.add_argument("--revision", help="branch, tag or commit of a Hub model")

    def execute(self) -> dict:
        from dataclasses import asdict
        from pathlib import Path

        from ..checkpoint.integers import quantize
        from ..checkpoint.load import local_folder
        from ..pruning.configuration import CONFIG_NAME

        args = self.args
        folder = local_folder(args.model, args.revision)
        found = quantize(folder, args.output, args.bits, args.group, args.scales, args.format)
        self.saved = True
        say(str(found))
        # What was never pruned says nothing that could be verified.
        then = "verify {}" if (Path(args.output) / CONFIG_NAME).is_file() else "evaluate {} --dataset FILE"
        print(f"saved to {args.output}; next: optimum-cli dsa {then.format(args.output)}")
        return {"output": args.output, **asdict(found)}
