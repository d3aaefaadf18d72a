"""A smaller model as a checkpoint: what is known of it, and whether a run of it can be as asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from ..common.ranks import current_ranks
from ..pruning.divided import check_divisible
from ..pruning.report import PruningReport
from ..pruning.structured.checks import check_cuttable, check_resumable
from ..pruning.structured.configuration import DSAStructuredConfig
from ..pruning.structured.described import after
from ..pruning.structured.prune import StructuredReport
from ..pruning.zeros import found_report


def report_of_cut(model: nn.Module, cut: StructuredReport, known: PruningReport | None) -> PruningReport:
    """The report of a `model` that was `cut` just now: its zeros as they are counted, and what was `known` of cuts."""
    return replace(found_report(model), structured=after(cut, known and known.structured))


def check_run(
    model: nn.Module, config: DSAStructuredConfig, checkpoints: str | Path | None = None, resume: bool = False
) -> None:
    """Raise `ValueError` where structures cannot be cut out of `model`, or a run of it cannot be as asked."""
    check_divisible(config, current_ranks())
    check_resumable(config, checkpoints, resume)
    check_cuttable(model, config)
