"""What an option of a command does with its values: none that is given is dropped without a word."""

from __future__ import annotations

from argparse import Action, ArgumentParser, BooleanOptionalAction
from collections.abc import Iterable
from functools import partial
from typing import Any


def _begins(action: Action, namespace: Any) -> bool:
    """Whether `action` is given for the first time; what stands in the namespace until then is a default."""
    name = f"{action.dest}_given"
    begun = getattr(namespace, name, False)
    setattr(namespace, name, True)
    return not begun


def _set_once(action: Action, parser: ArgumentParser, namespace: Any, value: Any, option: str | None) -> None:
    earlier = getattr(namespace, action.dest, None)
    if not _begins(action, namespace) and earlier != value:
        said = f", {earlier} and {value}" if action.nargs is None else " otherwise"
        parser.error(f"{option or action.dest} is given twice{said}; give it once")
    setattr(namespace, action.dest, value)


class Once(Action):
    """An option with one value, which two do not agree on, or with a list, to which each time adds."""

    def __call__(self, parser, namespace, values, option_string=None):
        if not isinstance(values, list):
            _set_once(self, parser, namespace, values, option_string)
            return
        held = [] if _begins(self, namespace) else getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*held, *values])


class Names(Once):
    """An option that takes names, with spaces or commas between them."""

    splits = True

    def __call__(self, parser, namespace, values, option_string=None):
        super().__call__(parser, namespace, names_in(values), option_string)


class Several(Once):
    """An option that can be given several times, with one value each."""

    replaces = True

    def __call__(self, parser, namespace, values, option_string=None):
        super().__call__(parser, namespace, [values], option_string)


class Switch(Action):
    """An option without a value; another may say the opposite of it, and then they do not agree."""

    def __init__(self, option_strings, dest, const, **options):
        super().__init__(option_strings, dest, nargs=0, const=const, **{"default": not const} | options)

    def __call__(self, parser, namespace, values, option_string=None):
        _set_once(self, parser, namespace, self.const, option_string)


class OnOff(BooleanOptionalAction):
    """`--name` and `--no-name`, of which one is given."""

    def __call__(self, parser, namespace, values, option_string=None):
        _set_once(self, parser, namespace, not (option_string or "").startswith("--no-"), option_string)


def drop_nothing(parser: ArgumentParser) -> None:
    """Let the plain options of `parser` be of these kinds; to be called before any is added."""
    for name in (None, "store"):
        parser.register("action", name, Once)
    for name, value in (("store_true", True), ("store_false", False)):
        parser.register("action", name, partial(Switch, const=value))


def names_in(values: Iterable[str]) -> list[str]:
    """The names in texts of which each may hold several, with commas between them."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]
