"""How the error of every matrix rises with its sparsity: what an allocation has to work with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.files import write_text
from ..model.activations import held_in
from ..model.walk import walk_blocks
from ..pruning.allocate import architecture_for, check_dense
from ..pruning.allocation import Allocation
from ..pruning.allocation.layout import by_block, grid
from ..pruning.calibration import Calibration
from ..pruning.configuration import DSAConfig
from .realise import check_searchable
from .realise.database import relative_error
from .realise.masks import shown


CURVES = "an error curve"
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Sensitivity:
    """Error curves: matrix -> share of its output, ‖(W − Ŵ)X‖² ÷ ‖W X‖², that is lost at each of `levels`.

    Attributes:
        config (`DSAConfig`): by which method the matrices were pruned; its sparsity is not looked at.
        levels (`tuple[float, ...]`): sparsities, ascending.
        errors (`Mapping[str, tuple[float, ...]]`): matrix -> error at each level, on inputs of the dense model.
        sizes (`Mapping[str, int]`): matrix -> weights.
        calibration (`Mapping[str, Any]`): facts of the text.
    """

    config: DSAConfig
    levels: tuple[float, ...]
    errors: Mapping[str, tuple[float, ...]]
    sizes: Mapping[str, int]
    calibration: Mapping[str, Any] | None = None

    def by_block(self) -> dict[str, list[float]]:
        """Block -> mean error of its matrices at each level, weighted by their sizes."""
        found = [by_block(level) for level in self._levels()]
        return {block: [level[block] for level in found] for block in found[0]}

    def by_kind(self) -> dict[str, list[float]]:
        """Kind of matrix -> mean error over the blocks at each level."""
        found: dict[str, list[float]] = {}
        for level in self._levels():
            blocks, kinds, errors = grid(level)
            for kind in kinds:
                known = [errors[block, kind] for block in blocks if (block, kind) in errors]
                found.setdefault(kind, []).append(sum(known) / len(known))
        return found

    def _levels(self) -> list[Allocation]:
        """The errors at each level in the form of shares per unit, which knows where units sit."""
        names = list(self.errors)
        return [
            Allocation({name: min(self.errors[name][place], 1.0) for name in names}, dict(self.sizes), "errors")
            for place in range(len(self.levels))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Method, levels and curves as JSON values."""
        settings = self.config.to_dict()
        return {
            "method": {name: settings[name] for name in ("method", "pattern", "update", "metric")},
            "calibration": None if self.calibration is None else dict(self.calibration),
            "levels": list(self.levels),
            "matrices": {name: list(errors) for name, errors in self.errors.items()},
            "sizes": dict(self.sizes),
            "blocks": self.by_block(),
            "kinds": self.by_kind(),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")


@torch.no_grad()
def sensitivity(
    model: nn.Module, calibration: Calibration | None, config: DSAConfig, levels: Sequence[float] = LEVELS
) -> Sensitivity:
    """The error curves of all matrices that `config` prunes in `model`, which is not changed.

    All levels of a matrix share its statistics and one decomposition of them. The inputs are those of the model as it
    is, so that targets and order of the method make no difference.

    Args:
        calibration (`Calibration`, *optional*): needed by a method that reads inputs.
        levels (`Sequence[float]`): sparsities, in (0, 1).

    Raises:
        ValueError: the pattern removes the same of every matrix, the model is pruned already, or text is needed and
            missing.
    """
    check_searchable(config)
    method, levels = config.resolved, tuple(sorted(levels))
    if not levels or not 0 < levels[0] <= levels[-1] < 1:
        raise ValueError(f"Levels are sparsities in (0, 1), at least one, got {list(levels)}.")
    architecture = architecture_for(model, config)
    check_dense(model, config, CURVES)
    reads = (method.reads | method.metric_reads) - {"cross_gram", "residual"}
    if reads and calibration is None:
        raise ValueError(f"The method {config.method!r} needs calibration text; pass some.")
    batches = calibration.batches(config.batch_size) if reads else None
    errors: dict[str, tuple[float, ...]] = {}
    for walked in walk_blocks(
        model,
        architecture,
        batches,
        reads=reads,
        sequential=False,
        progress=shown("Measuring sensitivity"),
        held=held_in(config.activations),
    ):
        for weight in walked.weights:
            tensor, statistics = walked.tensor(weight), walked.statistics.get(weight.name)
            step = weight.size // method.pattern.width if method.pattern.in_groups else 1
            counts = [round(level * weight.size / step) * step for level in levels]
            pruned = (method.of_weight(weight.name).pruned(tensor, statistics, count) for count in counts)
            errors[weight.name] = tuple(relative_error(tensor, new, statistics, method.damping) for new in pruned)
    sizes = {weight.name: weight.size for weight in architecture.weights}
    return Sensitivity(config, levels, errors, sizes, calibration.facts() if calibration else None)
