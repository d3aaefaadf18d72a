"""How large a weight file may become: checked before any work, as transformers reads it only when it saves."""

from __future__ import annotations

import re
from typing import Any


def check_shard_size(size: Any) -> None:
    """Raise `ValueError` unless `size` is a number of bytes, or a text such as "2GB", above zero."""
    if isinstance(size, int) and not isinstance(size, bool):
        fits = size > 0
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[KMGT]B\s*", str(size), re.IGNORECASE)
        fits = found is not None and float(found[1]) > 0
    if not fits:
        raise ValueError(f"max_shard_size is a number of bytes, or a text such as '2GB' or '500MB'; got {size!r}.")
