"""Masks of metrics that change from candidate to candidate: of the dense model, each made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ...model.activations import held_in
from ...model.architecture import Architecture
from ...model.offload import resident
from ...model.statistics import LayerStatistics
from ...model.walk import reads_of, walk_blocks
from ...pruning.calibration import Calibration
from ...pruning.configuration import DSAConfig
from .masks import ANCHOR_TOKENS, Masks, first_of
from .realisation import REALISATIONS


class MetricMasks(Masks):
    """`Masks` for a search in which the metric is looked for as well.

    The statistics of the dense model are read once, and kept; what a metric makes of them is computed for every
    candidate, and nothing of it is kept but its masks, a byte per weight.

    Args:
        reads: what metrics may read: "inputs", or "gradients" where these are candidates' leaves.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        calibration: Calibration | None,
        config: DSAConfig,
        reads: str = "inputs",
    ):
        super().__init__(model, architecture, calibration, config)
        self._own, self._reads = config, reads_of(reads) | config.resolved.metric_reads
        self._statistics: dict[str, LayerStatistics] = {}
        self._masked_by: tuple[str | None, tuple[int, ...]] | None = None

    def take_metric(self, metric: str | None) -> None:
        """From now on remove what this metric says, a text as `DSAConfig.metric` takes it; `None`: the config's."""
        self.config = self._own if metric is None else replace(self._own, metric=metric)
        self.method = self.config.resolved

    @contextmanager
    def at(self, counts: Mapping[str, int]) -> Iterator[None]:
        """The model with masks that remove `counts`, by the metric that was taken, from the dense model's statistics.

        An update, if there is one, is left to the prune itself.
        """
        self._ensure_masks(counts)
        with self.masked.active():
            yield

    @contextmanager
    def slopes(self, counts: Mapping[str, int], band: float = 0.0) -> Iterator[dict[str, float]]:
        """Raises `ValueError`: a slope is along one order of the weights, and here the order is what changes."""
        raise ValueError("Metrics are compared without slopes; search with one metric, --metric, for those.")
        yield {}

    @torch.no_grad()
    def _ensure_masks(self, counts: Mapping[str, int]) -> None:
        asked = (self.config.metric, tuple(counts.values()))
        if self._masked_by == asked:
            return
        self._forget()
        self._ensure_statistics()
        for weight in self.architecture.weights:
            with resident(self.model, [weight.module]):
                scores = self.method.metric(weight.tensor(self.model), self._statistics.get(weight.name))
            self.masked.exact[weight.name] = self.method.pattern.keep(scores, counts[weight.name])
        self._masked_by = asked

    def _ensure_statistics(self) -> None:
        """Have the statistics of the dense model: read once, however many metrics are made of them."""
        if self._statistics:
            return
        self._ensure_gradients(self._reads)
        batches = first_of(self.calibration.batches(self.config.batch_size), ANCHOR_TOKENS)
        given = {"reads": self._reads, "sequential": False, "gradients": self._gradients}
        given["held"] = held_in(self.config.activations)
        for walked in walk_blocks(self.model, self.architecture, batches, **given):
            self._statistics |= walked.statistics

    def _forget(self) -> None:
        super()._forget()
        self._masked_by = None


REALISATIONS.add("metrics", MetricMasks, proxy="one-shot masks")
