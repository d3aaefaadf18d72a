"""Names for operations: what can be chosen by a string, where it was published, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class UnknownNameError(KeyError):
    """A name that no table holds. A `KeyError` whose text reads as a sentence."""

    # `KeyError` shows the repr of its text, quotes and escaped line ends among it.
    __str__ = Exception.__str__


def near(name: str, known: Iterable[str]) -> str:
    """A hint such as ` Did you mean 'var'?`, or nothing when no known name is close."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""


class Registry(dict):
    """Operations by name, each with the address of the publication it comes from, and other facts about it.

    ```python
    METRICS = Registry("metric")

    @METRICS.register(reference="https://arxiv.org/abs/2306.11695", reads="inputs")
    def wanda(weight, statistics): ...

    METRICS["wanda"], METRICS.references["wanda"], METRICS.fact("wanda", "reads")
    ```

    An operation is registered under its own name. A second operation of the same name raises `ValueError`, an
    unknown name `UnknownNameError` with the near ones.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.references: dict[str, str | None] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def register(self, name: str | None = None, *, reference: str | None = None, **facts) -> Callable:
        """A decorator that adds a function under `name`, by default the function's own."""

        def decorator(operation):
            return self.add(name or operation.__name__, operation, reference=reference, **facts)

        return decorator

    def add(self, name: str, operation, *, reference: str | None = None, **facts):
        """`operation`, now known as `name`."""
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is already registered; choose another name or `del` it first.")
        self[name] = operation
        self.references[name] = reference
        self._facts[name] = facts
        return operation

    def fact(self, name: str, fact: str, default: Any = None) -> Any:
        """What was said of the operation `name` when it was registered."""
        self[name]
        return self._facts[name].get(fact, default)

    def __delitem__(self, name):
        super().__delitem__(name)
        del self.references[name], self._facts[name]

    def __missing__(self, name):
        raise UnknownNameError(f"Unknown {self.kind} {name!r}.{near(name, self)} Known: {', '.join(sorted(self))}.")
