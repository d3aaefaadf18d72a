"""What a search found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..allocation import Allocation
from ..configuration import DSAConfig
from ..files import write_text
from .space import Candidate
from .trace import SearchTrace


@dataclass(frozen=True)
class Finalist:
    """A candidate that met the real prune: `loss` is its divergence on all validation windows afterwards."""

    candidate: Candidate
    loss: float
    allocation: Allocation


@dataclass(frozen=True)
class SearchResult:
    """The outcome of `search`; `print` shows the finalists.

    Attributes:
        config (`DSAConfig`): what was searched for.
        finalists (`Sequence[Finalist]`): best first, by validation loss after the sequential prune; uniform is one.
        trace (`SearchTrace`): everything that was tried.
        budget (`Budget`): what it cost.
    """

    config: DSAConfig
    finalists: Sequence[Finalist]
    trace: SearchTrace
    budget: object

    @property
    def best(self) -> Allocation:
        """The winner's allocation: what `DSAConfig(allocation=...)` takes."""
        return self.finalists[0].allocation

    def save(self, folder: str | Path) -> None:
        """Write `allocation.json` (the winner) and `search.json` (the finalists) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "allocation.json", json.dumps(self.best.to_dict(), indent=2) + "\n")
        write_text(folder / "search.json", json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict:
        return {
            "config": self.config.to_dict(),
            "finalists": [
                {
                    "candidate": row.candidate.to_dict(),
                    "validation_loss": row.loss,
                    "allocation": row.allocation.to_dict(),
                }
                for row in self.finalists
            ],
            "trials": len(self.trace.trials),
            "tokens": self.budget.spent_tokens,
            "evaluations": self.budget.spent_evaluations,
            "seconds": round(self.budget.spent_seconds, 3),
        }

    def __str__(self) -> str:
        lines = [f"{'validation loss':>15}  allocation"]
        lines += [f"{row.loss:>15.4f}  {row.candidate}" for row in self.finalists]
        spent = self.budget
        lines.append(
            f"{len(self.trace.trials)} trials, {spent.spent_tokens:,} validation tokens, {spent.spent_seconds:.0f} s"
        )
        return "\n".join(lines)
