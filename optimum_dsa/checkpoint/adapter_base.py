"""An adapter on disk, and the pruned model under it: the one is worth nothing without the zeros of the other."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..pruning.report import PruningReport
from .load import find_description


def check_base(
    model: nn.Module, stored: str | None, directory: Path, report: PruningReport, compressed: bool = False
) -> None:
    """Make the adapters of `model` name the pruned model in `stored` as their base, in place.

    Raises:
        ValueError: no folder is known to hold the weights under the adapters with their zeros, or `directory` would
            replace it.
    """
    way_out = "save the pruned model to a folder of its own first, or merge the adapter (RecoveryConfig(merge=True))"
    if compressed:
        raise ValueError("An adapter has no zeros to leave out; save it without compressed=True, or merge it.")
    if stored is None:
        raise ValueError(f"The adapter would be saved without the pruned weights that it belongs to; {way_out}.")
    if Path(stored).is_dir() and directory.is_dir() and Path(stored).samefile(directory):
        raise ValueError(f"{directory} holds the pruned model under the adapter; save the adapter to another folder.")
    found = find_description(stored)
    if found is None or found["achieved"]["units"] != dict(report.achieved):
        raise ValueError(f"{stored} does not hold the zeros that the model under the adapter has; {way_out}.")
    for config in model.peft_config.values():
        config.base_model_name_or_path = stored
