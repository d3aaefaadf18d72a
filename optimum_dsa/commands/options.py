"""Options of commands from the fields of a configuration: a new setting is an option, its docstring the help."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field
from typing import Any, Protocol

from ..common.escaping import one_line
from ..common.registry import UnknownNameError
from .config_file import take_config, without_required


class Group(Protocol):
    """What `add_argument_group` gives."""

    def add_argument(self, *names: str, **options: Any) -> Any: ...


# Further names of options, by setting; what turns a switch off has "no-" in front where nothing is said here.
SHORT = {"sparsity": ("-s",)}
OFF = {"sequential": ("--one-pass",), "merge": ("--keep-adapter",)}
TYPES = {"int": int, "float": float}


class CommandParser(ArgumentParser):
    """A parser of which a part is filled in when it is first used: reading a configuration's fields imports torch."""

    _later: Callable[[], None] | None = None
    settings: str | None = None  # module and name of the class of the command's configuration

    def later(self, fill: Callable[[], None]) -> None:
        """Have `fill` called before anything is parsed or help is shown."""
        self._later = fill

    def complete(self) -> CommandParser:
        """The parser with all its options."""
        fill, self._later = self._later, None
        if fill is not None:
            fill()
        return self

    def parse_known_args(self, args=None, namespace=None):
        self.complete()
        args = sys.argv[1:] if args is None else list(args)
        if any(action.dest == "config" for action in self._actions):
            self._take_config(args)
        return super().parse_known_args(args, namespace)

    def _take_config(self, args: list[str]) -> None:
        """Let `--config` fill in what `args` leave out; what is wrong with it ends the process with one line."""
        look = ArgumentParser(add_help=False)
        look.add_argument("--config", nargs="?")
        look.add_argument("--print-config", action="store_true")
        found, _ = look.parse_known_args(args)
        try:
            if found.config is not None:
                take_config(self, found.config, self.settings_class())
        except (ValueError, OSError, UnknownNameError) as error:
            self.exit(2, f"{self.prog}: error: {one_line(' '.join(str(error).split()))}\n")
        if found.print_config:
            without_required(self)

    def settings_class(self) -> type | None:
        """The class of the command's configuration."""
        return None if self.settings is None else _class(self.settings)

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

        parser.description = _with_names(parser.description or "")

        cls = _class(config)
        texts = _texts(cls)
        owner = {name: section for section, names in sections_of(cls).items() for name in names}
        for name, field in options_of(cls).items():
            if name not in without:
                chosen = (group for group, names in groups if {name, owner.get(name)} & {*names})
                _add(next(chosen, rest), name, field, texts.get(name, ""))

    if not isinstance(parser, CommandParser):
        fill()
        return
    parser.settings = config
    parser.later(fill)


def _with_names(text: str) -> str:
    """A description with the rows of the tables in the place of their names in braces."""
    if "{methods}" not in text:
        return text
    from ..pruning.allocation import ALLOCATIONS
    from ..pruning.presets import QUALITIES
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
    listed["qualities"] = "\n".join(indent + line for line in qualities)
    return text.format(**listed, permutations=", ".join(PERMUTATIONS), updates=", ".join(UPDATES))


def asked_settings(args: Any, cls: type) -> dict[str, Any]:
    """What the options of a command ask for, by the settings' flat names; nothing of what was left out."""
    from ..common.settings import options_of

    return {name: value for name in options_of(cls) if (value := getattr(args, name, None)) is not None}


def _add(group: Group, name: str, field: Field, text: str) -> None:
    from ..common.settings import flag_of, rule_of

    rule, flags = rule_of(field), [*SHORT.get(name, ()), flag_of(name)]
    default = field.default
    if default not in (MISSING, None, ()) and not isinstance(default, bool) and "efault" not in text:
        text += f" (default: {default})"
    options: dict[str, Any] = {"dest": name, "default": None, "help": text.replace("%", "%%")}
    if rule.kind == "bool" and rule.optional:
        options["action"] = BooleanOptionalAction
    elif rule.kind == "bool" and default:
        flags, options["action"] = [*OFF.get(name, ()), flag_of(name, off=True)], "store_false"
        options["help"] = f"not so: {text.removeprefix('whether ')}".replace("%", "%%")
    elif rule.kind == "bool":
        options["action"] = "store_true"
    elif rule.kind == "tuple[str, ...]":
        options |= {"nargs": "+", "metavar": "NAME"}
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
