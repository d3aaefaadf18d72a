"""What the commands share."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class LeafCommand(BaseOptimumCLICommand):
    """A command of ours: teaches in its help, and ends with one line and exit code 2 when its input is wrong."""

    DESCRIPTION = ""
    EXAMPLES = ""

    @classmethod
    def describe(cls, parser: ArgumentParser, name: str) -> None:
        """Give `parser` the command's description and examples."""
        parser.prog = f"optimum-cli dsa {name}"
        parser.usage = None
        parser.description, parser.epilog = cls.DESCRIPTION, f"examples:\n{cls.EXAMPLES}" if cls.EXAMPLES else None
        parser.formatter_class = RawDescriptionHelpFormatter

    def execute(self) -> None:
        """What the command does; errors in what the user gave are `ValueError`, `OSError` or `UnknownNameError`.

        A release of a dependency that cannot do it is a `DependencyError`.
        """
        raise NotImplementedError

    def left_behind(self) -> str:
        """What an interrupted run tells the user that it leaves."""
        return "nothing was written"

    def run(self) -> None:
        from ..common.escaping import one_line
        from ..common.fence_rows import DependencyError
        from ..common.registry import UnknownNameError

        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal without our bars and signs shows ? and goes on
        try:
            self.execute()
        except (ValueError, OSError, UnknownNameError, DependencyError) as error:
            message = one_line(" ".join(str(error).split())) or type(error).__name__
            print(f"optimum-cli dsa {self.COMMAND.name}: error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f"optimum-cli dsa {self.COMMAND.name}: interrupted, {one_line(self.left_behind())}", file=sys.stderr)
            sys.exit(130)


def say(text: str) -> None:
    """Print a text that may hold names from a stranger's files: nothing in it moves the cursor or hides letters."""
    from ..common.escaping import visible

    print(visible(text))


def add_bos_option(parser) -> None:
    """`--bos` and `--no-bos`; where neither is given, `None`: as the tokenizer does."""
    parser.add_argument(
        "--bos",
        action=BooleanOptionalAction,
        help="whether windows start with the beginning-of-sequence token (default: where the tokenizer adds it)",
    )


def check_texts(args, data) -> None:
    """Raise what is wrong with the texts that the options name, read as the `DataConfig` says.

    To be called before a model is loaded, which may take minutes.
    """
    from ..data import check_source

    for source in (args.dataset, getattr(args, "validation", None)):
        if source:
            check_source(source, data.text_column, data.split)


def add_loading_options(parser: ArgumentParser, reads_text: bool = True) -> None:
    """Options that say how a model is loaded, and its tokenizer where the command reads text."""
    group = parser.add_argument_group("loading the model")
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one for every process"
    )
    group.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16; auto keeps the checkpoint's own (default)"
    )
    group.add_argument(
        "--device-map",
        help="auto spreads over the devices; disk keeps weights there and brings them in block by block",
    )
    group.add_argument("--offload-folder", help="where changed weights go with --device-map disk (default: temporary)")
    if reads_text:
        group.add_argument("--tokenizer", help="folder or Hub id of the tokenizer (default: the model's own)")
    group.add_argument("--revision", help="branch, tag or commit of a Hub model")
    group.add_argument("--trust-remote-code", action="store_true", help="run the code that a Hub model brings along")


def loading_options(args) -> dict:
    """The `from_pretrained` arguments that `add_loading_options` asked for."""
    import torch

    from ..common.devices import own_device

    options: dict = {"dtype": args.dtype}
    if args.dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {args.dtype!r}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    if args.device_map:
        options["device_map"] = {"": args.device_map} if args.device_map in ("cpu", "disk") else args.device_map
        options["offload_folder"] = args.offload_folder
    else:
        device = own_device() if args.device == "auto" else args.device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"Device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        if device == "meta":
            raise ValueError("Device 'meta' holds no weights; name cpu, cuda or another device.")
        if device != "cpu":
            options["device_map"] = device
    if getattr(args, "tokenizer", None):
        options["tokenizer"] = args.tokenizer
    if args.revision:
        options["revision"] = args.revision
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    return options
