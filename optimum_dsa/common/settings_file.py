"""Settings in a file, YAML or JSON -> a dictionary, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import DEEPEST_JSON, LARGEST_JSON, read_json


# YAML 1.2's plain values. PyYAML's own are those of 1.1: "2:4" is 124 there, "no" is false and "1e-3" a text.
_PLAIN = {
    "null": (r"null|Null|NULL|~|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
}


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a file by their names, YAML unless it is called .json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML or JSON, or no settings by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such file of settings: {str(path)!r}.")
    data = read_json(path, unique=True) if path.suffix.lower() == ".json" else _read_yaml(path)
    if data is None:
        return {}
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise ValueError(f"{path} holds no settings by name: expected lines such as 'sparsity: 0.6'.")
    return dict(data)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as YAML that `read_settings` gives back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what either version of YAML would take for something else than a text."""

        def increase_indent(self, flow: bool = False, indentless: bool = False):
            return super().increase_indent(flow, False)

    for kind, (pattern, first) in _PLAIN.items():
        Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{pattern})$"), list(first))
    return yaml.dump(dict(settings), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _read_yaml(path: Path) -> Any:
    import yaml

    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes; no file of settings needs more than {LARGEST_JSON:,}.")
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_loader(yaml))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None


def _loader(yaml: Any) -> type:
    """A safe loader of YAML 1.2's plain values that takes no name twice."""

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}
        depth = 0

        def compose_node(self, parent, index):
            if self.depth > DEEPEST_JSON or self.check_event(yaml.AliasEvent):
                what = "it is nested too deep" if self.depth > DEEPEST_JSON else "write the value where *name stands"
                raise yaml.YAMLError(what)
            self.depth += 1
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.YAMLError(f"{name!r} stands there twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    for kind, (pattern, first) in _PLAIN.items():
        found = [*first[:-1], ""] if kind == "null" else list(first)
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{pattern})$"), found)
    # 010 is ten: PyYAML's own constructor takes it for eight
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))
    return Loader
