"""Options of commands from the fields of a configuration: a new setting is an option, its docstring the help."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import textwrap
from argparse import SUPPRESS, Action, ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from shlex import quote
from typing import Any, NoReturn, Protocol

from ..common.escaping import one_line
from ..common.launched import process_index
from ..common.registry import UnknownNameError
from .actions import Names, OnOff, drop_nothing
from .config_file import default_without_file, take_config, without_required
from .fences import actions_of


class Group(Protocol):
    """What `add_argument_group` gives."""

    def add_argument(self, *names: str, **options: Any) -> Any: ...


# Further names of options, by setting; what turns a switch off has "no-" in front where nothing is said here.
SHORT = {"sparsity": ("-s",)}
OFF = {"sequential": ("--one-pass",), "merge": ("--keep-adapter",)}
TYPES = {"int": int, "float": float}


class CommandParser(ArgumentParser):
    """A parser of which a part is filled in when it is first used: reading a configuration's fields imports torch."""

    _later: tuple[Callable[[], None], ...] = ()
    configs: tuple[type, ...] = ()  # the configurations that its options are made from
    alternatives: Mapping[str, type] = {}  # those that are meant where an option of theirs is given -> by that option

    def __init__(self, *args: Any, **options: Any):
        # A part of a name would be taken for another option: `--allocation` of a search, for --allocation-metric.
        super().__init__(*args, **{"allow_abbrev": False, **options})
        drop_nothing(self)

    def error(self, message: str) -> NoReturn:
        """End the process with one line, of several the first's; argparse's own way prints all options first."""
        line = f"{self.prog}: error: {one_line(' '.join(message.split()))} (see {self.prog} --help)\n"
        self.exit(2, line if process_index() == 0 else None)

    def later(self, fill: Callable[[], None]) -> None:
        """Have `fill` called before anything is parsed or help is shown."""
        self._later = (*self._later, fill)

    def complete(self) -> CommandParser:
        """The parser with all its options."""
        fills, self._later = self._later, ()
        for fill in fills:
            fill()
        return self

    def parse_known_args(self, args=None, namespace=None):
        self.complete()
        args = sys.argv[1:] if args is None else list(args)
        if any(action.dest == "config" for action in actions_of(self)):
            self._take_config(args)
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # the parser above would name no command, nor where its options are told
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def _take_config(self, args: list[str]) -> None:
        """Let `--config` fill in what `args` leave out; what is wrong with it ends the process with one line."""
        look = ArgumentParser(add_help=False)
        look.add_argument("--config", nargs="?")
        look.add_argument("--print-config", action="store_true")
        found, _ = look.parse_known_args(args)
        try:
            if found.config is not None:
                take_config(self, found.config, self.settings_class, args)
        except (ValueError, OSError, UnknownNameError) as error:
            self.exit(2, f"{self.prog}: error: {one_line(' '.join(str(error).split()))}\n")
        if found.print_config:
            without_required(self)

    def settings_class(self, given: Collection[str] = ()) -> type | None:
        """The class of the command's configuration; of several the one that an option that is `given` belongs to."""
        configs = self.complete().configs
        chosen = next((config for key, config in self.alternatives.items() if key in given), None)
        return chosen or (configs[-1] if configs else None)

    def foreign(self, config: type | None) -> set[str]:
        """The settings of the command's other configurations that `config` does not have."""
        from ..common.settings import options_of

        others = {name for other in (*self.configs, *self.alternatives.values()) for name in options_of(other)}
        return others - (options_of(config).keys() if config else set())

    def format_help(self) -> str:
        self.complete()
        return super().format_help()

    def format_usage(self) -> str:
        self.complete()
        return super().format_usage()


def add_settings(
    parser: ArgumentParser,
    groups: Collection[tuple[Group, Collection[str]]],
    config: str,
    rest: Group,
    without: Collection[str] = (),
) -> None:
    """Add an option for every setting of a configuration to `parser`, when it is used.

    Args:
        groups: groups of options, and the settings or sections that go there.
        config: module and name of the class, such as "pruning.configuration.DSAConfig".
        rest: the group of all other settings.
        without: settings that have no option.
    """

    def fill() -> None:
        from ..common.settings import options_of, sections_of

        if isinstance(parser, CommandParser):
            parser.configs = (*parser.configs, _class(config))
        parser.description = _with_names(parser.description or "")

        cls = _class(config)
        texts = _texts(cls)
        owner = {name: section for section, names in sections_of(cls).items() for name in names}
        for name, field in options_of(cls).items():
            if name not in without:
                chosen = (group for group, names in groups if {name, owner.get(name)} & {*names})
                _add(next(chosen, rest), name, field, texts.get(name, ""))

    parser.later(fill) if isinstance(parser, CommandParser) else fill()


def add_alternative(parser: ArgumentParser, key: str, config: str, rest: Group, without: Collection[str] = ()) -> None:
    """Add the options of another configuration, meant where its setting `key` is given; settings of both share one.

    To be called after [`add_settings`].

    Args:
        config: module and name of the class.
        rest: the group of the settings that are its alone.
        without: settings that have no option.
    """

    def fill() -> None:
        from ..common.settings import flag_of, options_of

        cls = _class(config)
        if isinstance(parser, CommandParser):
            parser.alternatives = {**parser.alternatives, key: cls}
        texts, actions = _texts(cls), {action.dest: action for action in actions_of(parser)}
        for name, field in options_of(cls).items():
            if name in without:
                continue
            if name not in actions:
                _add(rest, name, field, texts.get(name, ""))
                continue
            text = f"{texts.get(name, '')}".replace("%", "%%")
            if text not in (actions[name].help or ""):
                actions[name].help = f"{actions[name].help}. With {flag_of(key)}: {text}"
            if isinstance(field.default, bool) and field.default and actions[name].const is True:
                # What is off for the one is on for the other.
                rest.add_argument(flag_of(name, off=True), dest=name, action="store_false", default=None, help=text)

    parser.later(fill) if isinstance(parser, CommandParser) else fill()


def _with_names(text: str) -> str:
    """A description with the rows of the tables in the place of their names in braces."""
    if "{methods}" not in text:
        return text
    from ..pruning.allocation import ALLOCATIONS
    from ..pruning.presets import QUALITIES
    from ..pruning.structured.importance import IMPORTANCES
    from ..pruning.structured.structure import KINDS
    from ..pruning.unstructured.methods import METHODS
    from ..pruning.unstructured.permutations import PERMUTATIONS
    from ..pruning.unstructured.updates import UPDATES

    methods = [
        f"{name:<14} {METHODS.fact(name, 'about', f'{row.metric}, {row.pattern}, {row.update}')}"
        for name, row in METHODS.items()
    ]
    qualities = [f"{name:<14} {QUALITIES.fact(name, 'about', row)}" for name, row in QUALITIES.items()]
    indent = " " * 14
    allocations = textwrap.fill(", ".join(ALLOCATIONS) + ";", 100, initial_indent=indent, subsequent_indent=indent)
    listed = {"methods": "\n".join(indent + line for line in methods), "allocations": allocations}
    listed["structures"] = "\n".join(f"{indent}{name:<14} {what}" for name, what in KINDS.items())
    listed["importances"] = textwrap.fill(
        ", ".join(IMPORTANCES), 100, initial_indent=indent, subsequent_indent=indent
    ).strip()
    listed["qualities"] = "\n".join(indent + line for line in qualities)
    return text.format(**listed, permutations=", ".join(PERMUTATIONS), updates=", ".join(UPDATES))


def asked_settings(args: Any, cls: type) -> dict[str, Any]:
    """What the options of a command ask for, by the settings' flat names; nothing of what was left out."""
    from ..common.settings import options_of

    return {name: value for name in options_of(cls) if (value := getattr(args, name, None)) is not None}


def in_options(message: str, parser: ArgumentParser) -> str:
    """An error of the library in the words of a shell: `num_samples=4` is `--num-samples 4` where `parser` has that.

    What is replaced: a setting with its value (behind a dotted path, too), one whose name is no English word, and the
    one that a sentence begins with ("span is a whole number of ..."). What stands in quotes is the user's and stays.
    """
    actions = {action.dest: action for action in actions_of(_complete(parser)) if action.option_strings}
    for config in getattr(parser, "configs", ()):
        for part in fields(config):
            # The setting that a section is short for has the section's option: `steps` is --reconstruct.
            if (short := part.metadata.get("shorthand")) and part.name in actions:
                actions.setdefault(short, actions[part.name])
    if not actions:
        return message
    known = "|".join(sorted(actions, key=len, reverse=True))
    value = r"""'[^']*'|"[^"]*"|\[[^\]]*\]|[\w+-]+(?:\.\w+)?"""
    found = re.compile(
        rf"""(?P<quoted>(?<!\w)(?:'[^']*'|"[^"]*"))|(?<![\w/.=-])(?:[a-z_]+\.)*(?P<name>{known})=(?P<value>{value})"""
        rf"|(?<![\w/.=-])(?P<bare>{known})(?![\w/=-]|\.\w)"
    )

    def replaced(match: re.Match) -> str:
        if match["name"]:
            return _given(actions[match["name"]], match["value"])
        first = match.start() == 0 and message[match.end() :].startswith(" is ")
        if match["bare"] and ("_" in match["bare"] or first):
            return _flags(actions[match["bare"]])[0]
        return match[0]

    return found.sub(replaced, message)


def as_given(args: Any, parser: ArgumentParser, names: Iterable[str]) -> str:
    """The options of `parser` for `names` that `args` ask for, each with a space in front, to be pasted in a shell."""
    asked, wanted, said = vars(args), set(names), []
    for action in actions_of(_complete(parser)):
        value = asked.get(action.dest)
        own = default_without_file(action)
        if action.dest in wanted and action.option_strings and value is not None and value != own:
            several = hasattr(action, "replaces")  # each with the option in front
            said += [f" {_given(action, repr(one))}" for one in (value if several else [value])]
    return "".join(said)


def evaluate_options(args: Any, parser: ArgumentParser) -> str:
    """What `evaluate` is to be given for a model that a command has written, as that loaded and read its own."""
    # Not the type of its numbers, its tokenizer or its revision: the folder that was written has its own.
    own = as_given(args, parser, ("bos", "device", "device_map", "trust_remote_code"))
    return f" --dataset FILE{own}"


def taken(parser: ArgumentParser, without: Collection[str] = ()) -> list[str]:
    """The names of all options of `parser`, but for help and those `without`."""
    actions = (action for action in actions_of(_complete(parser)) if action.option_strings)
    return [action.dest for action in actions if action.default is not SUPPRESS and action.dest not in without]


def _complete(parser: ArgumentParser) -> ArgumentParser:
    return parser.complete() if isinstance(parser, CommandParser) else parser


def _flags(action: Action) -> tuple[str, str | None]:
    """The option that turns `action` on, and the one that turns it off, where there are two."""
    if isinstance(action, BooleanOptionalAction):
        off = next(flag for flag in action.option_strings if flag.startswith("--no-"))
        return next(flag for flag in action.option_strings if flag.startswith("--") and flag != off), off
    return action.option_strings[-1], None


def _given(action: Action, value: str) -> str:
    """`action` with a value, in Python's writing, as it is given in a shell; "no --flag" where that means none."""
    on, off = _flags(action)
    if value == "None":
        return f"no {on}"
    if off is not None or action.nargs == 0:
        switched = value == ("True" if off is not None else str(action.const))
        return on if switched else off or f"no {on}"
    try:
        said = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        said = value
    if not isinstance(said, (list, tuple)):
        said = [said]
    elif action.nargs is None:  # no value that can be given so
        return f"{on} {value}"
    return " ".join([on, *(quote(str(each)) for each in said)])


def _add(group: Group, name: str, field: Field, text: str) -> None:
    from ..common.settings import flag_of, rule_of

    rule, flags = rule_of(field), [*SHORT.get(name, ()), flag_of(name)]
    default = field.default
    if default not in (MISSING, None, ()) and not isinstance(default, bool) and "efault" not in text:
        text += f" (default: {default})"
    options: dict[str, Any] = {"dest": name, "default": None, "help": text.replace("%", "%%")}
    if rule.kind == "bool" and rule.optional:
        options["action"] = OnOff
    elif rule.kind == "bool" and default:
        flags, options["action"] = [*OFF.get(name, ()), flag_of(name, off=True)], "store_false"
        options["help"] = f"not so: {text.removeprefix('whether ')}".replace("%", "%%")
    elif rule.kind == "bool":
        options["action"] = "store_true"
    elif rule.kind == "tuple[str, ...]":
        options |= {"nargs": "+", "metavar": "NAME", "action": Names}
    else:
        options |= {"type": TYPES.get(rule.kind, str), "choices": None}
    group.add_argument(*flags, **options)


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"optimum_dsa.{module}"), name)


def _texts(cls: type) -> dict[str, str]:
    """Setting -> its docstring's first sentences as plain text, those of sections as well."""
    from ..common.settings import describe_settings, section_types

    found: dict[str, str] = {}
    for section in section_types(cls):
        found |= describe_settings(section)
    found |= describe_settings(cls)
    return {name: _plain(text) for name, text in found.items()}


def _plain(text: str) -> str:
    """A docstring's text as a line of help: no markup, a small letter first, no full stop."""
    text = re.sub(r"\[?`+\"?([^`\"]*)\"?`+\]?", r"\1", text)
    text = text.rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text
