"""The structure of the package, measured from its own imports: `python examples/structure.py` prints it.

Ends with exit code 1 where a limit is broken: an import that goes upward, too many floors or modules at the door, a
file or a function that nobody can read in one go. No part of the package is imported for it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path


# From the ground up. A room may import from those before it; two of one line know nothing of each other.
FLOORS = (
    ("common",),
    ("model", "data", "packed"),
    ("pruning",),
    ("checkpoint", "evaluation", "search"),
    ("recovery",),
    ("sharing",),
    ("pruner",),
    ("commands",),
)
LIMITS = {"modules and rooms at the door": 14, "floors": 8, "upward imports": 0, "lines of a file": 400}
LIMITS |= {"lines of a function": 80}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of `package`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports, at the top or inside a function; not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_types:
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module
                if target in known and target != name:
                    yield target


def room(module: str) -> str:
    """The room or door of a module: the part behind the package's name; the package itself has none."""
    return module.split(".")[1] if "." in module else ""


def arrows(known: dict[str, Path]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(room, room) -> the imports between them."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, path in known.items():
        for target in set(imports(name, path, known)):
            if room(name) != room(target) and room(name):
                found.setdefault((room(name), room(target)), []).append((name, target))
    return found


def upward(found: dict[tuple[str, str], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The imports that do not go down: to a room above, beside, or nowhere on the list."""
    level = {name: number for number, names in enumerate(FLOORS) for name in names}
    return [
        pair
        for (source, target), pairs in sorted(found.items())
        for pair in pairs
        if not level.get(target, len(FLOORS)) < level.get(source, -1)
    ]


def floors(found: dict[tuple[str, str], list[tuple[str, str]]]) -> int:
    """The longest chain of rooms of which each imports from the next."""

    @cache
    def height(name: str) -> int:
        below = {target for source, target in found if source == name}
        return 1 + max((height(target) for target in below), default=0)

    return max(height(name) for names in FLOORS for name in names)


def longest_function(known: dict[str, Path]) -> tuple[int, str]:
    """Lines and place of the longest function."""
    return max(
        (node.end_lineno - node.lineno + 1, f"{name}.{node.name}")
        for name, path in known.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def main(package: Path) -> int:
    known = modules(package)
    found = arrows(known)
    wrong = upward(found)
    file = max(known, key=lambda name: len(known[name].read_text(encoding="utf-8").splitlines()))
    function = longest_function(known)
    measured = {
        "modules and rooms at the door": (len({room(name) for name in known if room(name)}), ""),
        "floors": (0 if wrong else floors(found), ""),
        "upward imports": (len(wrong), ", ".join(f"{a} <- {b}" for b, a in wrong)),
        "lines of a file": (len(known[file].read_text(encoding="utf-8").splitlines()), file),
        "lines of a function": function,
    }
    for what, (number, where) in measured.items():
        broken = "" if number <= LIMITS[what] else "   TOO MANY"
        print(f"{what:<30}{number:>5}  of at most {LIMITS[what]}{broken}  {where}".rstrip())
    print(f"{'modules':<30}{len(known):>5}\n{'arrows between rooms':<30}{len(found):>5}")
    for names in reversed(FLOORS):
        print(
            "   ".join(
                f"{name} -> {', '.join(sorted(b for a, b in found if a == name)) or 'nothing'}" for name in names
            )
        )
    return int(any(number > LIMITS[what] for what, (number, _) in measured.items()))


if __name__ == "__main__":
    default = Path(__file__).resolve().parents[1] / "optimum_dsa"
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else default))
