"""What the commands share."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand

from .actions import OnOff, Several
from .config_file import add_config_options, config_text
from .options import in_options
from .processes import ONE, own_folder, process_index, speaks_of, with_others
from .stopping import Terminated, stoppable


if TYPE_CHECKING:
    from ..common.output import OutputFolder


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class LeafCommand(BaseOptimumCLICommand):
    """A command of ours: teaches in its help, and ends with one line and exit code 2 when its input is wrong.

    Attributes:
        exit_code (`int`): what the process ends with, once `execute` has come back.
        place (`OutputFolder`): what it writes, where that is a folder.
        saved (`bool`): whether all that it writes is in place.
        processes (`str`): what several that a launcher starts are: refused ("one"), a run in which the first speaks
            and an error of one ends all ("together"), or seen to by the command itself ("own").
    """

    DESCRIPTION = ""
    EXAMPLES = ""
    exit_code = 0
    place: OutputFolder | None = None
    saved = False
    processes = ONE

    @classmethod
    def describe(cls, parser: ArgumentParser, name: str) -> None:
        """Give `parser` the command's description, examples and the options that every command has."""
        parser.prog = f"optimum-cli dsa {name}"
        parser.usage = None
        parser.description, parser.epilog = cls.DESCRIPTION, f"examples:\n{cls.EXAMPLES}" if cls.EXAMPLES else None
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        add_config_options(parser)
        loudness = parser.add_mutually_exclusive_group()
        loudness.add_argument("-q", "--quiet", action="store_true", help="print errors, and the JSON asked for")
        loudness.add_argument("-v", "--verbose", action="store_true", help="say what is done meanwhile")

    def execute(self) -> Any:
        """What the command does: text for people is printed, facts for programs are returned, as JSON values.

        Errors in what the user gave are `ValueError`, `OSError` or `UnknownNameError`; a release of a dependency that
        cannot do it is a `DependencyError`.
        """
        raise NotImplementedError

    def has_settings(self) -> bool:
        """Whether the options of a configuration say something here."""
        return True

    def is_whole(self) -> bool:
        """Whether all that was asked for is in place, so that nothing is left to be stopped."""
        return self.saved or (self.place is not None and self.place.done)

    def left_behind(self) -> str:
        """What an interrupted run tells the user that it leaves."""
        return "nothing was written"

    def run(self) -> None:
        stdout, sys.stdout = sys.stdout, _UntilClosed(sys.stdout)
        try:
            self._run()
        finally:
            sys.stdout = stdout

    def _run(self) -> None:
        from ..common.escaping import one_line
        from ..common.fence_rows import DependencyError
        from ..common.registry import UnknownNameError

        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a terminal without our bars and signs shows ? and goes on
        asked = vars(self.args) if self.args else {}
        as_json, quiet = asked.get("json", False), asked.get("quiet", False) or process_index() > 0
        try:
            if asked.get("print_config"):
                given = {name for name, value in asked.items() if value is not None}
                choose = getattr(self.parser, "settings_class", lambda given: None)
                settings = choose(given) if self.has_settings() else None
                say(config_text(self.parser, self.args, settings).rstrip())
                return
            with stoppable(self.is_whole):
                with (
                    with_others(self.COMMAND.name, self.processes),
                    _spoken(as_json, quiet, asked.get("verbose", False) and not quiet),
                ):
                    facts = self.execute()
                if as_json and process_index() == 0:
                    print(json.dumps(facts))
        except (ValueError, OSError, UnknownNameError, DependencyError) as error:
            message = one_line(in_options(" ".join(str(error).split()), self.parser)) or type(error).__name__
            if speaks_of(error):
                print(f"optimum-cli dsa {self.COMMAND.name}: error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stopped:
            left = "the result is whole" if self.is_whole() else self.left_behind()
            print(f"optimum-cli dsa {self.COMMAND.name}: interrupted, {one_line(left)}", file=sys.stderr)
            sys.exit(143 if isinstance(stopped, Terminated) else 130)
        if self.exit_code:
            sys.exit(self.exit_code)


class _UntilClosed:
    """A stream whose reader may go away, as `head` and pagers do: then the work goes on, and is said to nobody."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._to_nobody()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._to_nobody()

    def _to_nobody(self) -> None:
        # What is buffered is written at the end all the same: by then it has somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _spoken(as_json: bool, quiet: bool, verbose: bool) -> Iterator[None]:
    """Inside, text for people is printed unless `as_json` or `quiet`, and logs and progress are as loud as asked."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from ..common.import_hook import after_import

    package = logging.getLogger("optimum_dsa")
    level = package.level
    with ExitStack() as stack:
        stack.callback(package.setLevel, level)
        if quiet or as_json:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if quiet:
            package.setLevel(logging.ERROR)
            # Theirs are warnings to developers, such as that weights were offloaded as we asked.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            after_import("accelerate.logging", lambda: logging.getLogger("accelerate").setLevel(logging.ERROR))
            of_tasks = logging.getLogger("lm_eval")
            stack.callback(of_tasks.setLevel, of_tasks.level)
            of_tasks.setLevel(logging.ERROR)
            if not are_progress_bars_disabled("optimum_dsa"):
                disable_progress_bars("optimum_dsa")
                stack.callback(enable_progress_bars, "optimum_dsa")
        if verbose:
            package.setLevel(logging.INFO)
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            package.addHandler(handler)
            stack.callback(package.removeHandler, handler)
        if quiet or not sys.stderr.isatty():  # a log file would be filled with bars
            after_import("transformers.utils.logging", lambda: _quiet_loading(quiet))
            after_import("datasets.utils.tqdm", _quiet_datasets)
        yield


def _quiet_loading(ours: bool) -> None:
    """No bars of transformers and the Hub's client; with `ours`, none of this package's either."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    silent = ours or are_progress_bars_disabled("optimum_dsa")
    transformers_logging.disable_progress_bar()
    if ours:
        transformers_logging.set_verbosity_error()
    if not silent:
        enable_progress_bars("optimum_dsa")


def _quiet_datasets() -> None:
    importlib.import_module("datasets.utils.tqdm").disable_progress_bars()  # its package may not be whole yet


def say(text: str) -> None:
    """Print a text that may hold names from a stranger's files: nothing in it moves the cursor or hides letters."""
    from ..common.escaping import visible

    print(visible(text))


def add_bos_option(parser) -> None:
    """`--bos` and `--no-bos`; where neither is given, `None`: as the tokenizer does."""
    parser.add_argument(
        "--bos",
        action=OnOff,
        help="whether windows start with the beginning-of-sequence token (default: where the tokenizer adds it)",
    )


def check_texts(args, data, otherwise: str | None = None) -> None:
    """Raise what is wrong with the texts that the options name, read as the `DataConfig` says.

    `otherwise` is the split where none is named.

    To be called before a model is loaded, which may take minutes.
    """
    from ..common.apart import same_source
    from ..data import check_source

    if data.image_column is not None:  # pictures are read with the model's processor
        return
    if source := asked_source(args):
        check_source(source, data.reading(otherwise))
    if validation := getattr(args, "validation", None):
        check_source(validation, data.beside(validation).reading(otherwise))
        if any(same_source(one, validation) for one in (source if isinstance(source, dict) else [source])):
            raise ValueError(
                f"--validation {validation} is the text of --dataset, of which it would tell what is known already; "
                "give another text, or leave --validation out."
            )


def add_source_options(group, default: str | None = None, required: bool = False) -> None:
    """`--dataset`, which can be given several times, and `--weights`; [`asked_source`] reads them."""
    said = "" if default is None else f" (default: {default})"
    group.add_argument(
        "--dataset",
        action=Several,
        required=required,
        help=".txt, .jsonl, .json or .parquet file, folder, or a dataset's name: wikitext2, c4, a Hub id; several "
        f"are mixed{said}",
    )
    group.add_argument(
        "--weights", nargs="+", type=float, metavar="WEIGHT", help="share of each --dataset (default: all the same)"
    )
    group.set_defaults(otherwise_dataset=default)


def asked_source(args) -> Any:
    """What `--dataset` and `--weights` name: a source, or several with their weights; `None` where there is none."""
    named, weights = args.dataset or [args.otherwise_dataset], args.weights
    if weights is not None and len(weights) != len(named):
        raise ValueError(f"--weights has {len(weights)} numbers for {len(named)} of --dataset; give one for each.")
    if len({*named}) < len(named):
        raise ValueError(f"--dataset names {max(named, key=named.count)} more than once; name it once, with a weight.")
    return named[0] if len(named) == 1 else dict(zip(named, weights or [1.0] * len(named)))


def check_weights(args, loading: dict) -> None:
    """Raise where the weights of the model that the options name are packed and cannot be pruned.

    To be called before it is loaded.
    """
    from pathlib import Path

    from ..checkpoint.forms import check_unpacked, located
    from ..checkpoint.load import stated_in

    path, options = located(args.model, loading)
    if not options.get("gguf_file"):
        check_unpacked(stated_in(path, Path(path), options), path)


def add_kernels_option(parser: ArgumentParser) -> None:
    """The option by which a command that multiplies with packed matrices may compile what does it."""
    parser.add_argument(
        "--compile-kernels",
        action="store_true",
        help="compile the kernels of packed matrices where there are none, once, with the compiler of this machine",
    )


def allow_kernels(args) -> None:
    """Have kernels be compiled at their first use where `add_kernels_option` was answered so."""
    if args.compile_kernels:
        os.environ["OPTIMUM_DSA_JIT"] = "1"


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
    group.add_argument("--gguf-file", help="the GGUF in the model's folder or repository to read; made dense")
    group.add_argument("--trust-remote-code", action="store_true", help="run the code that the model brings along")


def loading_options(args) -> dict:
    """The `from_pretrained` arguments that `add_loading_options` asked for."""
    import torch

    from ..common.devices import own_device

    options: dict = {"dtype": args.dtype}
    if args.dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {args.dtype!r}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    if args.device_map:
        options["device_map"] = {"": args.device_map} if args.device_map in ("cpu", "disk") else args.device_map
        options["offload_folder"] = own_folder(args.offload_folder)
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
        models = getattr(args, "model", None) or []
        models = models if isinstance(models, list) else [models]
        if models and all(os.path.isdir(model) for model in models):
            raise ValueError(
                f"--revision {args.revision} is of a Hub model, and {models[0]} is a folder; leave it out."
            )
        options["revision"] = args.revision
    if args.gguf_file:
        options["gguf_file"] = args.gguf_file
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    return options
