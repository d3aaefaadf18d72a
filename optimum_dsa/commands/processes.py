"""A command that a launcher has started several times: who speaks, and how an error of one ends all."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

from ..common.launched import process_count, process_index


ONE, TOGETHER, OWN = "one", "together", "own"  # what `LeafCommand.processes` may be


def with_others(name: str, processes: str) -> AbstractContextManager:
    """The context for the work of command `name`, of which several `processes` can make something, or not.

    Raises:
        ValueError: there are several, and one would do.
    """
    if process_count() == 1 or processes == OWN:
        return nullcontext()
    if processes == ONE:
        raise ValueError(
            f"{name} runs in one process, and {process_count()} were started; use optimum-cli dsa {name}, without "
            "torchrun."
        )
    from ..common.ranks import current_ranks

    return current_ranks().together()


def speaks_of(error: Exception) -> bool:
    """Whether this process says what went wrong: the first does, and any that has lost the others."""
    from ..common.ranks import LostRanksError

    return process_index() == 0 or isinstance(error, LostRanksError)


def check_placed(device_map: str | None) -> None:
    """Raise `ValueError` where a device map spreads a model that several processes train."""
    if process_count() > 1 and device_map not in (None, "cpu", "disk"):
        raise ValueError(
            f"--device-map {device_map} spreads the model of a process over devices, and each of {process_count()} "
            "processes trains on one: leave it out, and share the weights with --sharding fsdp if they do not fit."
        )


def own_folder(folder: str | None) -> str | None:
    """A folder of this process in `folder`, where there are several."""
    return os.path.join(folder, f"rank-{process_index()}") if folder and process_count() > 1 else folder
