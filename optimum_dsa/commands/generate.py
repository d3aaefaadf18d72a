"""`optimum-cli dsa generate`."""

from __future__ import annotations

from .actions import OnOff
from .base import LeafCommand, add_kernels_option, add_loading_options, allow_kernels, loading_options


class GenerateCommand(LeafCommand):
    """A model tried: what it writes after a prompt."""

    DESCRIPTION = """\
Let a model continue a prompt, or answer it where the model was trained to. The text is printed as it comes; how fast
it was read and written is said at the end, on standard error. Any folder will do that optimum-dsa writes, and so will
dense models. What is measured of one run is no benchmark, which optimum-cli dsa bench is.
"""
    EXAMPLES = """\
  optimum-cli dsa generate out --prompt "The sky is"
  optimum-cli dsa generate out --prompt "Why is the sky blue?" --chat --max-new-tokens 200 --temperature 0.7
  optimum-cli dsa generate out --prompt - < question.txt > answer.txt
"""

    @staticmethod
    def parse_args(parser):
        GenerateCommand.describe(parser, "generate")
        parser.add_argument("model", help="folder or Hub id of the model")
        parser.add_argument("--prompt", required=True, help="what it continues or answers; - reads standard input")
        parser.add_argument("--max-new-tokens", type=int, default=128, help="most that are written (default: 128)")
        parser.add_argument(
            "--temperature",
            type=float,
            default=0.0,
            help="0 always takes the likeliest token (default); more takes others more often",
        )
        parser.add_argument(
            "--top-p",
            type=float,
            default=1.0,
            help="draw from the likeliest tokens that have so much of the probability (default: 1, from all)",
        )
        parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
        parser.add_argument(
            "--chat",
            action=OnOff,
            help="whether the prompt is put in the tokenizer's chat template (default: where the model was trained "
            "to end its answers as the template does)",
        )
        add_kernels_option(parser)
        add_loading_options(parser)

    def left_behind(self) -> str:
        return "the text ends here"

    def execute(self) -> dict:
        import sys
        from dataclasses import asdict

        from ..evaluation.generate import generate_text
        from ..pruner import DSAPruner

        args = self.args
        allow_kernels(args)
        options = loading_options(args)
        prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
        pruner = DSAPruner.from_pretrained(args.model, **options)
        if pruner.tokenizer is None:
            raise ValueError(f"{args.model} has no tokenizer that could be loaded; name one with --tokenizer.")
        names = ("max_new_tokens", "temperature", "top_p", "seed", "chat")
        asked = {name: getattr(args, name) for name in names}
        found = generate_text(pruner.model, pruner.tokenizer, prompt, **asked, stream=write)
        print()
        if not (args.json or args.quiet):
            print(found, file=sys.stderr)
        return asdict(found)


def write(piece: str) -> None:
    """Print a piece of a text at once: on a terminal nothing in it moves the cursor, in a file it is as it is."""
    import sys

    from ..common.escaping import visible

    if sys.stdout.isatty():
        piece = "\t".join(map(visible, piece.split("\t")))
    print(piece, end="", flush=True)
