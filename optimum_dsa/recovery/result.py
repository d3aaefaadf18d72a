"""What recovery did, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.columns import columns
from ..evaluation.measurement import with_error
from .configuration import RecoveryConfig


@dataclass(frozen=True)
class RecoveryResult:
    """What recovery did; `print` shows it as a table.

    Attributes:
        config (`RecoveryConfig`): what was asked.
        before (`float`): perplexity on the validation windows before training.
        after (`float`): the same afterwards.
        steps (`int`): optimizer steps that were made, fewer than asked where training stopped early.
        history (`list[dict[str, float]]`): losses and learning rate by step.
        data (`dict[str, Any]`): sources, and numbers of windows and tokens.
        seconds (`float`): wall time of the training.
        before_error (`float`, *optional*): standard error of `before`; `None` for one window.
        after_error (`float`, *optional*): standard error of `after`.
    """

    config: RecoveryConfig
    before: float
    after: float
    steps: int
    history: list[dict[str, float]] = field(repr=False)
    data: dict[str, Any] = field(repr=False)
    seconds: float = 0.0
    before_error: float | None = None
    after_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the entry `recovery` of `dsa_config.json`."""
        errors = {"before_error": self.before_error, "after_error": self.after_error}
        known = {name: value for name, value in errors.items() if value is not None}
        return {
            "kind": "recover",
            "config": self.config.to_dict(),
            "perplexity": {"before": self.before, "after": self.after, **known},
            "steps": self.steps,
            "data": dict(self.data),
            "history": list(self.history),
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        table = [("step", "training loss", "validation loss")]
        for entry in self.history:
            losses = (f"{entry[name]:.4f}" if name in entry else "" for name in ("loss", "eval_loss"))
            table.append((f"{entry['step']:.0f}", *losses))
        lines = columns(table, left=())
        lines.append("-" * len(lines[0]))
        before, after = with_error(self.before, self.before_error, 3), with_error(self.after, self.after_error, 3)
        bos = {True: ", on sequences that start with BOS", False: ", on sequences without BOS"}
        said = bos.get(self.data.get("bos"), "")
        of = f" of {self.data['predicted']}" if "predicted" in self.data else ""
        lines.append(f"validation perplexity{of} {before} -> {after} in {self.steps} steps{said}")
        return "\n".join(lines)


def by_step(log: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """A Trainer's log with one entry per step that has a loss: step, losses, learning rate, and `elsa`'s residual."""
    steps: dict[float, dict[str, float]] = {}
    for entry in log:
        if "loss" in entry or "eval_loss" in entry:
            names = [name for name in ("step", "loss", "eval_loss", "learning_rate", "residual") if name in entry]
            steps.setdefault(entry["step"], {}).update({name: entry[name] for name in names})
    return list(steps.values())
