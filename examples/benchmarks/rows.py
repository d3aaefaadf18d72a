"""Rows of a table that takes hours: written as they end, and not run again."""

import json
from collections.abc import Callable
from pathlib import Path


class Rows:
    """Finished rows by what they depend on, kept in a file, a JSON object a line, where there is one."""

    def __init__(self, path: str | None):
        self.path = Path(path) if path else None
        lines = self.path.read_text().splitlines() if self.path and self.path.exists() else []
        self.known = {line["key"]: line["row"] for line in map(json.loads, lines)}

    def row(self, key: str, make: Callable[[], dict]) -> dict:
        """The row of this key, as it was found before, or made now."""
        if key not in self.known:
            self.known[key] = make()
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, "row": self.known[key]}) + "\n")
        return self.known[key]
