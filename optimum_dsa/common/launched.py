"""What a launcher (`torchrun`, `accelerate launch`) says of this process; asked without importing torch."""

from __future__ import annotations

import os


def process_count() -> int:
    """How many processes were started together; 1 without a launcher."""
    # Some clusters set WORLD_SIZE, and start one.
    return int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1


def process_index() -> int:
    """The number of this one of them."""
    return int(os.environ.get("RANK") or 0) if process_count() > 1 else 0
