"""`--config FILE` and `--print-config`: the options of a command in a file."""

from __future__ import annotations

from argparse import Action, ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .fences import actions_of, exclusive_of


NOT_READ = ("help", "config", "print_config")
# What a printed file says nothing of: a run decides it anew, or it is a secret.
WITHOUT = (*NOT_READ, "json", "quiet", "verbose", "token")


def add_config_options(parser: ArgumentParser) -> None:
    """`--config` and `--print-config`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="options from a file, YAML or JSON, by their names; or a dsa_config.json, or a folder with one. Options "
        "given beside it win",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all options as such a file, in YAML, and do nothing else"
    )


def take_config(
    parser: ArgumentParser, path: str, choose: Callable[[Collection[str]], type | None], words: Sequence[str] = ()
) -> None:
    """Make what a file says the defaults of a parser's options, of the required ones as well.

    Args:
        choose: the class of the command's configuration, whose sections the file may have, by the names that are
            given: of options on the command line or in the file.
        words: of the command line: an option there wins over those of the file that exclude it.

    Raises:
        ValueError: the file says what is no option, or not as it may be.
    """
    options = {word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    given, described, settings = _read(Path(path), choose, options)
    given = _by_options(parser, given, settings, path)
    actions = {action.dest: action for action in actions_of(parser) if action.dest not in NOT_READ}
    given = {name: value for name, value in given.items() if not _is_excluded(name, given, parser, path, words)}
    for name, value in given.items():
        action = actions.get(name)
        if action is None and described:
            _say_left_out(parser, name, value, settings)
        elif action is None:
            from ..common.registry import near

            raise ValueError(f"{path}: {parser.prog} has no option {name!r}.{near(name, actions)}")
        elif value is not None:
            checked = _checked(action, value, f"{path}: {name}")
            # A switch may have an option that turns it on and another that turns it off.
            for each in actions_of(parser):
                if each.dest == action.dest:
                    _make_default(each, checked)
    if described:
        parser.set_defaults(described_config=True)


def _by_options(parser: ArgumentParser, given: Mapping[str, Any], settings: type | None, path: str) -> dict[str, Any]:
    """A file's values by what their options are called inside, those of sections as well.

    Raises:
        ValueError: two of them say the same thing: `num_samples` and `num-samples`, or `data: {num_samples: ...}`.
    """
    from ..common.settings import flattened

    found: dict[str, Any] = {}
    for name, value in given.items():
        # A section may be an object, or be given by what it is short for.
        parts = flattened(settings, {name: value}) if settings and isinstance(value, Mapping) else {name: value}
        if name == "dataset" and isinstance(value, Mapping):  # each with its share
            parts = {"dataset": [*value], "weights": [*value.values()]}
        for inner, part in parts.items():
            dest, part = _meant(parser, inner, part)
            if dest in found:
                raise ValueError(f"{path}: {dest!r} stands there twice, in {name!r} again; write it once.")
            found[dest] = part
    return found


def _meant(parser: ArgumentParser, name: str, value: Any) -> tuple[str, Any]:
    """What the option `name` is called inside, and its value there: `one_pass: true` is `sequential: false`."""
    name = name.replace("-", "_")
    actions, flag = actions_of(parser), f"--{name.replace('_', '-')}"
    action = next((each for each in actions if flag in each.option_strings), None)
    if action is None or any(each.dest == name for each in actions):
        return name, value
    off = flag.startswith("--no-") if isinstance(action, BooleanOptionalAction) else action.const is False
    return action.dest, not value if off and isinstance(value, bool) else value


def _is_excluded(name: str, given: Mapping[str, Any], parser: ArgumentParser, path: str, words: Sequence[str]) -> bool:
    """Whether an option that goes without `name` is on the command line; raises where the file gives both."""
    group = next((each for each in exclusive_of(parser) if name in {one.dest for one in each}), [])
    others = [action for action in group if action.dest != name]
    both = [other.dest for other in others if given.get(name) and given.get(other.dest)]
    if both:
        raise ValueError(f"{path}: {name} and {both[0]} do not go together; leave out one of both.")
    flags = {flag for action in others for flag in action.option_strings}
    return any(word.split("=")[0] in flags for word in words)


def _read(
    path: Path, choose: Callable[[Collection[str]], type | None], options: Collection[str]
) -> tuple[dict[str, Any], bool, type | None]:
    """What a file says by its names, whether it is that of a pruned model or a saved configuration, and
    the class of the configuration that it is of.
    """
    from ..common.settings_file import read_settings
    from ..pruning.zeros import MEASURED  # the name of an allocation that nobody asked for

    if path.is_dir():
        path = path / "dsa_config.json"
    given = read_settings(path)
    described = isinstance(given.get("config"), Mapping)
    cut = given.get("structured") if described else None
    alone = isinstance(cut, Mapping) and (given.get("allocation") or {}).get("name") == MEASURED
    names = {"structures"} if alone else () if described else given
    settings, otherwise = choose({*options, *names}), choose(())
    if described and settings is not otherwise:
        if not isinstance(cut, Mapping) or not isinstance(cut.get("config"), Mapping):
            raise ValueError(f"{path} is that of a model out of which no structures were cut.")
        given = settings.from_dict(dict(cut["config"])).to_dict()
    elif described and hasattr(settings, "from_pretrained"):
        if alone:
            raise ValueError(f"{path} is that of a model whose structures were cut, and says nothing of weights.")
        given = settings.from_pretrained(path).to_dict()
    elif described:
        trained = given.get("recovery")
        if settings is None or not isinstance(trained, Mapping) or not isinstance(trained.get("config"), Mapping):
            raise ValueError(f"{path} is that of a pruned model, and says nothing of this command's options.")
        given = dict(trained["config"])
    elif settings is not None and path.suffix.lower() == ".json":
        given.pop("format_version", None)  # of a configuration in its first form
    return given, described, settings


def _say_left_out(parser: ArgumentParser, name: str, value: Any, settings: type) -> None:
    """Log that a saved configuration's setting is none of this command's, where it says something."""
    import logging

    from ..common.settings import options_of
    from ..common.values import short

    field = options_of(settings).get(name) or settings.__dataclass_fields__.get(name)
    value = tuple(value) if isinstance(value, list) else value  # which files have no other word for
    if value is not None and (field is None or value != field.default):
        logging.getLogger(__name__).warning("%s does without %s of the file, %s.", parser.prog, name, short(value))


def _checked(action: Action, value: Any, what: str) -> Any:
    """A file's value as an option has it."""
    if action.nargs == 0 or isinstance(action, BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"{what} is true or false, got {value!r}.")
        return value
    if action.nargs in ("+", "*") or hasattr(action, "replaces"):
        if isinstance(value, Mapping) and action.dest == "overrides":
            value = [f"{name}={_one(action, share, what)}" for name, share in value.items()]
        values = value if isinstance(value, list) else [value]
        found = [_one(action, part, what) for part in values]
        return [name for one in found for name in one.split(",")] if hasattr(action, "splits") else found
    # an allocation may stand in a file as an object
    return value if isinstance(value, Mapping) and action.dest == "allocation" else _one(action, value, what)


def _one(action: Action, value: Any, what: str) -> Any:
    kind = action.type or str
    if isinstance(value, (Mapping, list, bool)) or kind is int and not isinstance(value, int):
        raise ValueError(f"{what} is a {'whole number' if kind is int else 'single value'}, got {value!r}.")
    try:
        value = kind(value)
    except ArgumentTypeError as error:
        raise ValueError(f"{what} is {error}.") from None
    except ValueError:
        raise ValueError(f"{what} is a number, got {value!r}.") from None
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{what} is one of {', '.join(map(str, action.choices))}, got {value!r}.")
    return value


def default_without_file(action: Action) -> Any:
    """An option's default where no file gives it a value."""
    return getattr(action, "default_without_file", action.default)


def _make_default(action: Action, value: Any) -> None:
    # What the option is without the file stays known: next lines name what differs from it.
    action.default_without_file = default_without_file(action)
    action.default, action.required = value, False
    if not action.option_strings:
        action.nargs = "*" if action.nargs == "+" else "?"


def without_required(parser: ArgumentParser) -> None:
    """Let a parser do without what it requires: to show options, they need not be complete."""
    for action in actions_of(parser):
        if not action.option_strings and action.nargs in (None, "+"):
            action.nargs = "*" if action.nargs == "+" else "?"
        action.required = False


def config_text(parser: ArgumentParser, args: Any, settings: type | None) -> str:
    """The options of a command as a file that `--config` takes: what was given, and the defaults of the rest."""
    from ..common.settings_file import settings_text
    from .options import asked_settings

    values = {action.dest: getattr(args, action.dest, None) for action in actions_of(parser)}
    default = getattr(args, "otherwise_dataset", None)
    values["dataset"] = values.get("dataset") or (None if default is None else [default])
    if settings is not None:
        values |= _whole_settings(settings, asked_settings(args, settings), args)
    others = parser.foreign(settings) if hasattr(parser, "foreign") and settings is not None else ()
    has = {action.dest for action in actions_of(parser)} - {*WITHOUT, *others}
    shown = {name: _plain(value) for name, value in values.items() if name in has}
    return f"# {parser.prog} --config FILE\n" + settings_text(shown)


def _whole_settings(settings: type, asked: dict[str, Any], args: Any) -> dict[str, Any]:
    """All settings by their flat names; what a quality chooses stands there instead of its name."""
    from dataclasses import MISSING

    from ..common.settings import options_of

    found: dict[str, Any] = {}
    if getattr(args, "quality", None):
        from ..pruning.presets import with_quality

        asked, found["quality"] = with_quality(args.quality, asked), None
    defaults = {name: field.default for name, field in options_of(settings).items()}
    for name, default in defaults.items():
        if hasattr(args, name):
            found[name] = asked.get(name, None if default is MISSING else default)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
