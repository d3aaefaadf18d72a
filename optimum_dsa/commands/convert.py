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
quantised   the same, of a model pruned with --values: its kept weights as the whole numbers that they are
packed      compressed, and its matrices stay so in memory: the model multiplies with them as they are

Or write it as one file for another program, one way:

gguf        for llama.cpp: Llama, Mistral, Qwen, Gemma, Phi-3 and more, with --type in 8 or 4 bits, zeros kept; Llama
            and Mistral also where layers have widths of their own (needs the package gguf)
"""
    EXAMPLES = """\
  optimum-cli dsa convert out out-compressed --to compressed
  optimum-cli dsa convert out-compressed out-dense --to dense
  optimum-cli dsa convert out out-packed --to packed
  optimum-cli dsa convert smaller smaller.gguf --to gguf --type f16
  optimum-cli dsa convert out out.gguf --to gguf --type q4_0
"""

    @staticmethod
    def parse_args(parser):
        ConvertCommand.describe(parser, "convert")
        parser.add_argument("model", help="folder or Hub id of the checkpoint")
        parser.add_argument("output", help="folder or file to write; an earlier result there is replaced")
        parser.add_argument("--to", required=True, help="what to write: dense, compressed, quantised, packed or gguf")
        parser.add_argument("--type", help="numbers in a file for another program: f16 (the default), f32, q8_0, q4_0")
        parser.add_argument("--revision", help="branch, tag or commit of a Hub model")

    def execute(self) -> dict:
        from ..checkpoint.convert import convert
        from ..checkpoint.exports import EXPORTS, export
        from ..checkpoint.load import local_folder

        folder = local_folder(self.args.model, self.args.revision)
        if self.args.to in EXPORTS:
            size = export(folder, self.args.output, self.args.to, self.args.type)
            self.saved = True
            print(f"saved to {self.args.output}: {size:,} bytes")
            return {"output": self.args.output, "bytes": size}
        if self.args.type is not None:
            raise ValueError(f"--type is of --to {' or '.join(EXPORTS)}, not of --to {self.args.to}; leave it out.")
        before, after = convert(folder, self.args.output, self.args.to)
        self.saved = True
        print(f"saved to {self.args.output}: {before:,} bytes of weights before, {after:,} now ({after / before:.1%})")
        return {"output": self.args.output, "bytes_before": before, "bytes": after}
