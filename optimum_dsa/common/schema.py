"""JSON held against a schema: the part of JSON Schema (draft 2020-12) that the one of `dsa_config.json` uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .values import is_number, short


_TYPES = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": is_number,
}
_BOUNDS = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
_NOTES = ("$schema", "$defs", "title", "description")
_KNOWN = {*_NOTES, *_BOUNDS, "$ref", "anyOf", "type", "const", "enum", "required", "properties", "items"}
KEYWORDS = frozenset(_KNOWN | {"additionalProperties"})


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None, at: str = "") -> Iterator[str]:
    """What in `value` breaks `schema`, each as a sentence that names the place."""
    root = schema if root is None else root
    here = at or "the file"
    if "$ref" in schema:
        yield from violations(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    if "anyOf" in schema:
        found = [list(violations(value, option, root, at)) for option in schema["anyOf"]]
        if all(found):
            yield found[-1][0]
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_TYPES[name](value) for name in types):
        yield f"{here} is {' or '.join(types)}, got {short(value)}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{here} is {schema['const']!r}, got {short(value)}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{here} is {' or '.join(map(repr, schema['enum']))}, got {short(value)}"
    measurable = isinstance(value, (int, float)) and not isinstance(value, bool)
    for keyword, holds in _BOUNDS.items() if measurable else ():
        if keyword in schema and not holds(value, schema[keyword]):
            yield f"{here} breaks {keyword} {schema[keyword]}, got {short(value)}"
    if isinstance(value, dict):
        yield from _of_object(value, schema, root, at)
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            yield from violations(item, schema["items"], root, f"{at}[{number}]")


def _of_object(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], at: str) -> Iterator[str]:
    prefix = f"{at}." if at else ""
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{prefix}{name} is missing"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in known:
            yield from violations(item, known[name], root, prefix + name)
        elif others is False:
            yield f"{prefix}{name} is no known key; known: {', '.join(known)}"
        elif isinstance(others, dict):
            yield from violations(item, others, root, prefix + name)
