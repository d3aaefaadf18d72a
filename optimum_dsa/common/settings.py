"""Settings as fields: what each may be is said once, and checked, written, read and offered as options from there."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, get_args

from .registry import near
from .values import LARGEST_WHOLE, is_number


_KINDS = {
    "float": ("a number", "number"),
    "int": ("a whole number", "integer"),
    "bool": ("true or false", "boolean"),
    "str": ("a name", "string"),
    "tuple[str, ...]": ("a list of names", "array"),
}


@dataclass(frozen=True)
class Rule:
    """What a setting may be.

    Attributes:
        kind: of `_KINDS`; `None` where the class that has the field checks it.
        optional: whether it may be `None`.
        low, high: bounds that are allowed themselves.
        below: a bound that is not.
        choices: the only values.
        what: what the value is, in words, for errors.
    """

    kind: str | None
    optional: bool = False
    low: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    what: str | None = None

    def allows(self, value: Any) -> bool:
        """Whether `value` keeps the rule."""
        if value is None or self.kind is None:
            return self.optional or self.kind is None
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.kind in ("float", "int"):
            # True is an int in Python, and no number of samples.
            whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_WHOLE
            return (is_number(value) if self.kind == "float" else whole) and self._within(value)
        if self.kind == "tuple[str, ...]":
            return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        return isinstance(value, bool if self.kind == "bool" else str)

    def _within(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(map(repr, self.choices))
        text = self.what or _KINDS[self.kind][0]
        if self.low is not None and self.high is None and self.below is None:
            return f"{text} of at least {self.low:g}"
        if self.low is not None:
            end = f"{self.high:g}]" if self.below is None else f"{self.below:g})"
            return f"{text}, in [{self.low:g}, {end}"
        return text

    def schema(self) -> dict[str, Any]:
        """The rule in JSON Schema."""
        if self.choices:
            return {"enum": [*self.choices, *([None] if self.optional else [])]}
        name = _KINDS[self.kind][1]
        found: dict[str, Any] = {"type": [name, "null"] if self.optional else name}
        high = LARGEST_WHOLE if self.kind == "int" and self.high is None else self.high
        bounds = {"minimum": self.low, "maximum": high, "exclusiveMaximum": self.below}
        found |= {keyword: bound for keyword, bound in bounds.items() if bound is not None}
        return found | ({"items": {"type": "string"}} if name == "array" else {})


def setting(default: Any = MISSING, **rule) -> Any:
    """A field with a rule for its values: `low`, `high`, `below`, `choices`, `what` of [`Rule`]."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def section(kind: type, default: Any = None, shorthand: str | None = None) -> Any:
    """A field that holds settings of its own, a `kind`; a text or number given for it is its setting `shorthand`."""
    made = kind() if default is None else default
    return dataclasses.field(default=made, metadata={"section": kind, "shorthand": shorthand})


def rule_of(field: Field) -> Rule:
    """The rule that a field's type and `setting` make; a type that is no setting's has none."""
    # Text where annotations are postponed; `str | None` and `tuple[str, ...]` have no name, and write themselves.
    named = isinstance(field.type, type) and not get_args(field.type)
    kind = field.type.__name__ if named else str(field.type)
    optional = kind.endswith(" | None")
    kind = kind.removesuffix(" | None")
    return Rule(kind if kind in _KINDS else None, optional, **field.metadata.get("rule", {}))


def check_settings(config: Any) -> None:
    """Raise `ValueError` for the first field whose rule is broken; lists become tuples, in place.

    Called by `__post_init__` of a frozen dataclass.
    """
    for field in fields(config):
        value, rule = getattr(config, field.name), rule_of(field)
        if "section" in field.metadata:
            object.__setattr__(config, field.name, _section_from(field, value))
        elif not rule.allows(value):
            hint = near(str(value), rule.choices) if rule.choices else ""
            if rule.kind == "tuple[str, ...]":
                hint = f" Write {field.name}=['{value}']."
            raise ValueError(f"{field.name} is {rule}, got {value!r}.{hint}")
        elif rule.kind == "tuple[str, ...]":
            # Frozen from here on; JSON has lists only, and a list could be changed later.
            object.__setattr__(config, field.name, tuple(value))


def _section_from(field: Field, value: Any) -> Any:
    kind, shorthand = field.metadata["section"], field.metadata["shorthand"]
    if isinstance(value, kind):
        return value
    rule = rule_of(kind.__dataclass_fields__[shorthand]) if shorthand else None
    try:
        if rule and (value is None or isinstance(value, str if rule.kind == "str" else (int, float))):
            return replace(field.default, **{shorthand: value})
        if isinstance(value, Mapping):
            return settings_from(kind, value, field.default)
    except ValueError as error:
        if shorthand == "name" and str(error).startswith("name is "):
            # Several sections have a name, and each is called as the section.
            raise ValueError(f"{field.name}{str(error).removeprefix('name')}") from None
        raise
    raise ValueError(f"{field.name} is a {kind.__name__}, got {value!r}.")


def options_of(cls: type) -> dict[str, Field]:
    """Every setting by its flat name, those of sections as well: what a command line offers."""
    found: dict[str, Field] = {}
    for field in fields(cls):
        if "section" in field.metadata:
            inner = {part.name: part for part in fields(field.metadata["section"])}
            shorthand = field.metadata["shorthand"]
            found |= {field.name if name == shorthand else name: part for name, part in inner.items()}
        else:
            found[field.name] = field
    return found


def section_types(cls: type) -> list[type]:
    """The classes of the sections of `cls`."""
    return [field.metadata["section"] for field in fields(cls) if "section" in field.metadata]


def sections_of(cls: type) -> dict[str, list[str]]:
    """Section -> flat names of the settings in it, but for the one that the section's own name stands for."""
    return {
        field.name: [
            part.name for part in fields(field.metadata["section"]) if part.name != field.metadata["shorthand"]
        ]
        for field in fields(cls)
        if "section" in field.metadata
    }


def nested(cls: type, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their flat names, each put into the section of `cls` that it belongs to."""
    out = dict(flat)
    for field in fields(cls):
        if "section" not in field.metadata:
            continue
        shorthand = field.metadata["shorthand"]
        inner = {part.name for part in fields(field.metadata["section"])} - {shorthand}
        moved = {name: out.pop(name) for name in inner & out.keys()}
        if moved:
            held = _section_from(field, out.get(field.name, field.default))
            out[field.name] = {part.name: getattr(held, part.name) for part in fields(held)} | moved
    return out


def flattened(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """`settings_to`'s form with every setting under its flat name; the other way round as `nested`."""
    out = dict(data)
    for field in fields(cls):
        if "section" in field.metadata and isinstance(inner := out.pop(field.name, None), Mapping):
            shorthand = field.metadata["shorthand"]
            out |= {field.name if name == shorthand else name: value for name, value in inner.items()}
    return out


def flag_of(name: str, off: bool = False) -> str:
    """The command-line option of a setting; `off` for what turns it off: "--num-samples", "--no-sequential"."""
    return f"--{'no-' if off else ''}{name.replace('_', '-')}"


def settings_from(cls: type, data: Mapping[str, Any], default: Any = None) -> Any:
    """A `cls` from `settings_to`'s form, or with the settings of its sections given flat.

    Raises:
        ValueError: a key that is no setting; it names the near ones.
    """
    data, known = nested(cls, data), [field.name for field in fields(cls)]
    for key in data:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no {key!r}.{near(key, known)} Known: {', '.join(known)}.")
    if default is not None:
        return replace(default, **data)
    for field in fields(cls):
        if field.default is MISSING and field.name not in data:
            raise ValueError(f"{cls.__name__} needs a {field.name!r}.")
    return cls(**data)


def settings_to(config: Any) -> dict[str, Any]:
    """All settings as JSON values, sections as objects."""
    out = {}
    for field in fields(config):
        value = getattr(config, field.name)
        value = settings_to(value) if "section" in field.metadata else value
        out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def settings_schema(cls: type, special: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of `settings_to`'s form; `special` holds those of fields without a rule."""
    properties = {}
    for field in fields(cls):
        if field.name in special:
            properties[field.name] = special[field.name]
        elif "section" in field.metadata:
            properties[field.name] = settings_schema(field.metadata["section"], special)
        else:
            properties[field.name] = rule_of(field).schema()
    required = [field.name for field in fields(cls) if field.default is MISSING]
    found = {"type": "object", "additionalProperties": False, "properties": properties}
    return found | ({"required": required} if required else {})


def takes_flat_names(cls: type) -> type:
    """A dataclass that for one more release takes, and has, its sections' settings as its own; with a warning."""
    sections = [field for field in fields(cls) if "section" in field.metadata]
    home = {
        part.name: field.name
        for field in sections
        for part in fields(field.metadata["section"])
        if part.name != field.metadata["shorthand"]
    }
    plain = cls.__init__

    def warn(name: str) -> None:
        warnings.warn(
            f"{cls.__name__}'s {name} is a setting of its {home[name]}: write {home[name]}="
            f"{_class_of(sections, home[name])}({name}=...), read .{home[name]}.{name}.",
            FutureWarning,
            stacklevel=3,
        )

    @functools.wraps(plain)
    def __init__(self, *args, **kwargs):
        flat = {name: kwargs[name] for name in kwargs if name in home}
        for name in flat:
            warn(name)
        plain(self, *args, **(nested(cls, kwargs) if flat else kwargs))

    def __getattr__(self, name):
        if name not in home:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
        warn(name)
        return getattr(getattr(self, home[name]), name)

    cls.__init__, cls.__getattr__ = __init__, __getattr__
    return cls


def _class_of(sections: list[Field], name: str) -> str:
    return next(field.metadata["section"].__name__ for field in sections if field.name == name)


def describe_settings(cls: type) -> dict[str, str]:
    """Setting -> what the docstring's `Args` say of it, without its type: what a command's help repeats."""
    line = re.compile(r"^    (\w+) \((?:[^()]|\([^()]*\))*\): (.*?)(?=^    \w|^\S|^$|\Z)", re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in line.findall(inspect.cleandoc(cls.__doc__ or ""))}
