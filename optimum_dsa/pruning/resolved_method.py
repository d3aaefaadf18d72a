"""A configuration's method, looked up once: the functions behind its names, and what they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.architecture import matches
from ..model.statistics import LayerStatistics
from ..model.walk import Reads, reads_of
from .sections import ValuesConfig
from .targets import dense_target
from .unstructured.floors import keep_beside
from .unstructured.grid import on_grid
from .unstructured.methods import METHODS
from .unstructured.metrics import METRICS
from .unstructured.patterns import Pattern
from .unstructured.permutations import PERMUTATIONS
from .unstructured.updates import UPDATES, Choice


if TYPE_CHECKING:
    from .configuration import DSAConfig


@dataclass(frozen=True)
class ResolvedMethod:
    """Metric × pattern × update of a [`DSAConfig`], ready to be called.

    Attributes:
        metric (`Callable`): (weight, statistics) -> scores, of what is removed.
        pattern (`Pattern`): within which sets of weights.
        update (`Callable`): (weight, statistics, choice) -> what the matrix becomes.
        damping (`float`): of the update, see [`UpdateConfig`].
        chooses (`bool`): whether the update chooses what is removed itself; then the metric is not asked.
        reads (`frozenset[str]`): what scores and update need of calibration: "inputs", "gram", and "cross_gram" where
            the targets are the dense model's ("residual" with what the residual stream lacks).
        metric_reads (`frozenset[str]`): what the metric needs, also where it is not asked: a search orders by it.
        allocation_metric (`Callable`): the scores from which the allocation is computed.
        allocation_reads (`frozenset[str]`): what the allocation needs.
        revive (`bool`): whether weights that are zero before may come back.
        values (`ValuesConfig`): whether the weights that stay become whole numbers times scales.
        still (`tuple[str, ...]`): names or patterns of matrices that are pruned without the update.
        still_metric (`Callable`): scores of what is removed of those.
    """

    metric: Callable[[Tensor, LayerStatistics | None], Tensor]
    pattern: Pattern
    update: Callable[[Tensor, LayerStatistics | None, Choice], Tensor]
    damping: float
    chooses: bool
    reads: Reads
    metric_reads: Reads
    allocation_metric: Callable[[Tensor, LayerStatistics | None], Tensor]
    allocation_reads: Reads
    revive: bool = False
    values: ValuesConfig = ValuesConfig()
    still: tuple[str, ...] = ()
    still_metric: Callable[[Tensor, LayerStatistics | None], Tensor] | None = None

    @classmethod
    def of(cls, config: DSAConfig) -> ResolvedMethod:
        """What the names in `config` stand for."""
        recipe, pattern = config.recipe, Pattern.parse(config.recipe.pattern)
        chooses = _chooses(recipe.update, recipe.metric, pattern)
        reads = reads_of(UPDATES.fact(recipe.update, "reads", "nothing"))
        metric_reads = reads_of(METRICS.fact(recipe.metric, "reads", "inputs"))
        # A metric that is never asked must not make the walk collect for it.
        if not chooses:
            reads |= metric_reads
        still_metric = METHODS.fact(config.method, "still", recipe.metric) if config.metric is None else config.metric
        if config.update.still:
            reads |= reads_of(METRICS.fact(still_metric, "reads", "inputs"))
        # Channels are put in order by the metric, and what the model gives is compared: that takes text in any case.
        if config.permute is not None:
            reads |= metric_reads | reads_of(PERMUTATIONS.fact(config.permute, "reads", "inputs"))
        if config.update.targets == "dense":
            reads |= {"cross_gram", "residual"} if config.update.residual else {"cross_gram"}
        if config.values.bits and (config.values.feedback or config.values.scales == "mse"):
            reads |= reads_of("gram" if config.values.feedback else "inputs")
        of_allocator = getattr(config.allocator, "reads", "nothing")
        runs = of_allocator == "model"  # which takes text, whatever the metric reads
        if runs or of_allocator == "scores":
            of_allocator = METRICS.fact(config.allocation_metric, "reads", "inputs")
        return cls(
            metric=METRICS[recipe.metric],
            pattern=pattern,
            update=UPDATES[recipe.update],
            damping=config.update.damping,
            chooses=chooses,
            reads=reads,
            metric_reads=metric_reads,
            allocation_metric=METRICS[config.allocation_metric],
            allocation_reads=reads_of(of_allocator) | (reads_of("inputs") if runs else frozenset()),
            revive=config.revive,
            values=config.values,
            still=config.update.still,
            still_metric=METRICS[still_metric],
        )

    def of_weight(self, name: str) -> ResolvedMethod:
        """The method as it is for one weight: some are pruned without the update."""
        if not any(matches(name, pattern) for pattern in self.still):
            return self
        return replace(self, metric=self.still_metric, update=UPDATES["none"], chooses=False, still=())

    @property
    def updates(self) -> bool:
        """Whether weights that stay are changed."""
        return self.update is not UPDATES["none"]

    @property
    def keeps_zeros_in_number(self) -> bool:
        """Whether a matrix loses no fewer weights than it has zeros; in groups the pattern says how many go."""
        return not self.revive and not self.pattern.in_groups

    def target(self, weight: Tensor, statistics: LayerStatistics | None) -> Tensor:
        """What a matrix, (out_features, in_features), is pruned as: itself, or what has the dense model's outputs."""
        if statistics is not None and "cross_gram" in self.reads:
            return dense_target(weight, statistics, self.damping)
        return weight

    @torch.no_grad()
    def pruned(self, weight: Tensor, statistics: LayerStatistics | None, count: int) -> Tensor:
        """A matrix, (out_features, in_features), without `count` of its weights, and with what makes up for them.

        Those that are zero before count, and stay zero unless they may `revive`: where there are more of them, or more
        of them in a group of an N:M pattern, more are zero in the end. The result has the weight's shape, in its dtype
        or in float32. At a count of 0 it is the weight, bit for bit.
        """
        # Nothing to choose and nothing to make up for; N:M removes its own number, whatever is asked.
        if count == 0 and not self.pattern.sparsity:
            return weight.clone()
        gone = None if self.revive else weight == 0
        older = 0 if gone is None else int(gone.sum())
        if not older:
            gone = None  # as of most models: nothing has to be looked up then
        elif not self.pattern.in_groups:
            count = max(count, older)
        weight = self.target(weight, statistics)
        keep = None if self.chooses else keep_beside(self.pattern, self.metric(weight, statistics), count, gone)
        new = self.update(weight, statistics, Choice(self.pattern, count, keep, self.damping, gone))
        # An update that a user registered may know nothing of them.
        return new if gone is None else new.masked_fill(gone, 0)

    def on_grid(self, weight: Tensor, statistics: LayerStatistics | None) -> Tensor:
        """What stays of a pruned matrix, (out_features, in_features), as whole numbers times scales, if so asked.

        The result has the weight's shape and dtype, and its zeros.
        """
        if (bits := self.values.bits) is None:
            return weight
        chosen = self.values.group, self.values.scales, self.values.feedback
        return on_grid(weight, statistics, bits, *chosen, self.damping)


def _chooses(update: str, metric: str, pattern: Pattern) -> bool:
    """Whether the update chooses under this metric and pattern: what it said of itself when it was registered."""
    if not UPDATES.fact(update, "chooses", False):
        return False
    by, kinds = UPDATES.fact(update, "criterion"), UPDATES.fact(update, "kinds")
    return (by is None or by == metric) and (kinds is None or pattern.kind in kinds)


def check_still(config: DSAConfig) -> None:
    """Raise `ValueError` where matrices are to be pruned without an update, and there is none."""
    if config.update.still and config.recipe.update == "none":
        raise ValueError(
            f"still={list(config.update.still)} are matrices that the update leaves alone, and method "
            f"{config.method!r} has none; use one that has, such as 'sparsegpt', or leave it out."
        )


def check_gradients(config: DSAConfig) -> None:
    """Raise `ValueError` where the metric reads gradients, and `config` would put them beside other weights."""
    if config.permute is not None and {"gradients", "regional"} & config.resolved.metric_reads:
        raise ValueError(
            f"permute={config.permute!r} puts channels in another order, and metric {config.recipe.metric!r} reads "
            "gradients, which are of the order before; use a metric that reads none, such as 'wanda', or leave "
            "permute out."
        )


def check_revive(config: DSAConfig) -> None:
    """Raise `ValueError` where no weight that is zero could become another, though `config` lets it."""
    update = config.recipe.update
    if (
        config.revive
        and config.update.targets != "dense"
        and (update == "none" or UPDATES.fact(update, "moves", False))
    ):
        raise ValueError(
            f"revive=True lets an update make something of weights that are zero, and {update!r} leaves weights as "
            "they are; use one that changes them, such as 'sparsegpt' or 'refit', or leave it out."
        )
