"""What a search found."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import Any

from ..common.columns import columns
from ..common.files import write_text
from ..common.output import OutputFolder
from ..pruning.allocation import Allocation
from ..pruning.configuration import DSAConfig
from .efficiency import Shift, efficiency, efficiency_line
from .problem import Budget
from .realise import REALISATIONS
from .space import Candidate
from .trace import SearchTrace


logger = logging.getLogger(__name__)

RESULT_FILES = ("allocation.json", "search.json", "search.png", "allocation.png", "heatmap.png")


@dataclass(frozen=True)
class Finalist:
    """A candidate that met the real prune.

    Attributes:
        candidate (`Candidate`): what it is.
        loss (`float`): divergence on validation windows after the sequential prune.
        perplexity (`float`): on the same.
        proxy (`float`): divergence with one-shot masks from the dense model's statistics, or with matrices that were
            solved about uniform, on fewer windows: what a search compares candidates by.
        allocation (`Allocation`): what `DSAConfig(allocation=...)` takes.
        removed (`Allocation`): what `prune` makes of it; another one where the pattern needs whole N.
    """

    candidate: Candidate
    loss: float
    perplexity: float
    proxy: float | None
    allocation: Allocation
    removed: Allocation | None = None

    def __post_init__(self):
        if self.removed is None:
            object.__setattr__(self, "removed", self.allocation)


@dataclass(frozen=True)
class SearchResult:
    """The outcome of `search`; `print` shows the finalists.

    Attributes:
        config (`DSAConfig`): what was searched for.
        finalists (`Sequence[Finalist]`): best first, by validation loss after the sequential prune; uniform is one.
        trace (`SearchTrace`): everything that was tried.
        budget (`Budget`): what it cost.
        notes (`Sequence[str]`): what the strategy has to say.
        baselines (`Mapping[str, Allocation]`): "uniform" and "owl" on the same model and text, to compare with.
        shifts (`Sequence[Shift]`): of several processes, what each computed and how long it waited.
    """

    config: DSAConfig
    finalists: Sequence[Finalist]
    trace: SearchTrace
    budget: Budget
    notes: Sequence[str] = ()
    baselines: Mapping[str, Allocation] = field(default_factory=dict)
    shifts: Sequence[Shift] = ()

    @property
    def best(self) -> Allocation:
        """The winner's allocation: what `DSAConfig(allocation=...)` takes."""
        return self.finalists[0].allocation

    @property
    def proxy_correlation(self) -> float | None:
        """Rank correlation (Spearman) over the finalists between the proxy and the loss after the sequential prune.

        `None` for fewer than three.
        """
        pairs = self._pairs()
        return rank_correlation(*zip(*pairs)) if len(pairs) >= 3 else None

    @property
    def proxy_concordance(self) -> float | None:
        """The same as Kendall's: how many more pairs of finalists both order alike than not; `None` as above."""
        pairs = self._pairs()
        return concordance(*zip(*pairs)) if len(pairs) >= 3 else None

    def _pairs(self) -> list[tuple[float, float]]:
        return [(row.proxy, row.loss) for row in self.finalists if row.proxy is not None]

    @property
    def proxy(self) -> str:
        """What candidates raced by, in words."""
        return REALISATIONS.fact(self.trace.settings.get("realisation", "masks"), "proxy", "a proxy")

    def save(
        self,
        folder: str | Path | OutputFolder,
        pictures: Callable[[SearchResult], Mapping[str, Any]] | None = None,
    ) -> None:
        """Write `allocation.json` (the winner) and `search.json` (the finalists) into `folder`.

        With `pictures`, such as `plot_search`, and matplotlib also what that draws: `search.png`, `allocation.png`
        (against the baselines) and `heatmap.png`. A file of such a name that was not written here is left alone: then
        `ForeignFileError`.
        """

        def fill(place: Path) -> None:
            self.best.save(place / "allocation.json")
            write_text(place / "search.json", json.dumps(self.to_dict(), indent=2) + "\n")
            for name, figure in self._drawn(pictures).items():
                figure.savefig(place / f"{name}.png", dpi=200)

        if isinstance(folder, OutputFolder):
            folder.write(fill)
        else:
            with OutputFolder(folder, RESULT_FILES) as output:
                output.write(fill, rescue=False)

    def _drawn(self, pictures: Callable[[SearchResult], Mapping[str, Any]] | None) -> Mapping[str, Any]:
        try:
            return {} if pictures is None else pictures(self)
        # A search of hours is not lost because matplotlib is missing.
        except ImportError as error:
            logger.info("No pictures beside the search: %s", error)
            return {}

    def figures(self) -> Mapping[str, Any]:
        """`plot_search` of this result; the method goes away in the next release."""
        warnings.warn(
            "SearchResult.figures() goes away; call optimum_dsa.plot_search(result).", FutureWarning, stacklevel=2
        )
        # by name: pictures stand above searches, and nothing here may need them
        return importlib.import_module("optimum_dsa").plot_search(self)

    def to_dict(self) -> dict:
        """Config, finalists and cost as JSON values."""
        found = {
            "config": self.config.to_dict(),
            "calibration": self.trace.settings.get("calibration"),
            "finalists": [
                {
                    "candidate": row.candidate.to_dict(),
                    "validation_loss": row.loss,
                    "validation_perplexity": row.perplexity,
                    "proxy_loss": row.proxy,
                    "allocation": row.allocation.to_dict(),
                    "removed": row.removed.overall,
                }
                for row in self.finalists
            ],
            "proxy": self.proxy,
            "proxy_correlation": self.proxy_correlation,
            "proxy_concordance": self.proxy_concordance,
            "notes": list(self.notes),
            "baselines": {name: allocation.to_dict() for name, allocation in self.baselines.items()},
            "trials": len(self.trace.trials),
            "tokens": self.budget.spent_tokens,
            "evaluations": self.budget.spent_evaluations,
            "budget": str(self.budget),
            "budget_used": round(self.budget.share, 4),
            "seconds": round(self.budget.spent_seconds, 3),
        }
        shifts = [shift.to_dict() for shift in self.shifts]
        return found | ({"processes": shifts, "efficiency": round(efficiency(self.shifts), 4)} if shifts else {})

    def __str__(self) -> str:
        rounds = any(row.removed.counts() != row.allocation.counts() for row in self.finalists)
        raced = any(row.proxy is not None for row in self.finalists)
        proxy = ["proxy loss"] * raced
        table = [("validation loss", "perplexity", *proxy, *(["removed"] * rounds), "allocation")]
        for row in self.finalists:
            proxy, removed = [_shown(row.proxy)] * raced, [f"{row.removed.overall:.4f}"] * rounds
            table.append((f"{row.loss:.4f}", f"{row.perplexity:.2f}", *proxy, *removed, str(row.candidate)))
        lines = columns(table, left=(-1,))
        explained = f"; proxy loss: {self.proxy}, which candidates race by" if raced else ""
        lines.append(f"validation loss and perplexity: as pruned{explained}")
        if (bos := (self.trace.settings.get("calibration") or {}).get("bos")) is not None:
            lines.append(f"calibrated and compared on windows {'that start with' if bos else 'without'} BOS")
        if (correlation := self.proxy_correlation) is not None:
            lines.append(
                f"rank correlation of the proxy with the prune: {correlation:.2f} (Spearman), "
                f"{self.proxy_concordance:.2f} (Kendall), over {len(self._pairs())} finalists"
            )
        processes = [efficiency_line(self.shifts)] if self.shifts else []
        return "\n".join([*lines, self._cost(), *processes, *self.notes])

    def _cost(self) -> str:
        """What was spent, of what, and what came on top."""
        spent = self.budget
        facts = [f"{len(self.trace.trials)} trials", f"{spent.spent_tokens:,} validation tokens"]
        if spent.strategy_tokens is not None:
            facts[-1] += f" ({spent.spent_tokens - spent.strategy_tokens:,} of them to rank the finalists)"
        facts.append(f"{spent.spent_seconds:.0f} s")
        line = f"{', '.join(facts)}; the budget was {spent}"
        if spent.share > 1:
            return f"{line}, and the finalists came on top"
        return f"{line}, {spent.share:.0%} of it used" if spent.share else line


def robustness_table(results: Sequence[SearchResult]) -> str:
    """What each of several seeds found, and how far they are apart: the paper's robustness table."""
    table = [("seed", "validation loss", "perplexity", "allocation")]
    winners = [result.finalists[0] for result in results]
    for result, row in zip(results, winners):
        table.append((str(result.config.data.seed), f"{row.loss:.4f}", f"{row.perplexity:.2f}", str(row.candidate)))
    if len(results) > 1:
        losses, perplexities = [row.loss for row in winners], [row.perplexity for row in winners]
        table.append(("mean", f"{mean(losses):.4f}", f"{mean(perplexities):.2f}", ""))
        table.append(("±", f"{stdev(losses):.4f}", f"{stdev(perplexities):.2f}", "(standard deviation)"))
    return "\n".join(columns(table, left=(-1,)))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, 1 where both order alike; equal values share a rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < value for v in values) + sum(v == value for v in values) / 2 for value in values]

    first, second = ranks(first), ranks(second)
    return correlation(first, second) if len(set(first)) > 1 < len(set(second)) else 0.0


def concordance(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's τ-a: pairs that both order alike less those that they do not, over all pairs; in [−1, 1]."""
    pairs = list(combinations(zip(first, second), 2))

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    return sum(sign(a - c) * sign(b - d) for (a, b), (c, d) in pairs) / len(pairs)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
