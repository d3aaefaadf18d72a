"""BESA: sparsities of a block's matrices that are learnt by what the block gives."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...common.progress import progress
from ...model.architecture import Weight
from ...model.walk import WalkedBlock, walk_blocks
from .budget import fit_to_budget
from .layout import place
from .whole import Seen, masked_for_the_next


logger = logging.getLogger(__name__)

REFERENCE = "https://arxiv.org/abs/2402.16880"

LEVELS = 100  # candidate sparsities 0, 0.01, ..., 0.99
WIDTH = 0.1  # of the candidates that have weight at the beginning
RATE, BATCH, EPOCHS = 0.1, 4, 2
BUDGET = 5.0  # weight of the squared relative miss of the target, as in the published scripts


@dataclass(frozen=True)
class Learnt:
    """What was learnt of one block: matrix -> sparsity; and its loss with the same everywhere, and so.

    A loss is Σ ‖block − dense block‖² over Σ ‖dense block‖², on all windows, at exactly the target.
    """

    sparsity: Mapping[str, float]
    uniform: float
    learnt: float


def learnt_sparsities(seen: Seen) -> dict[str, tuple[str, float, int]]:
    """Matrix -> its block, its learnt sparsity, and its size; the sparsity of every block is the target.

    Block after block: what goes into one comes of the pruned blocks before it, and what is to come out is the dense
    model's. Where learning does not lower the loss at exactly the target, all matrices of a block have the target.
    Memory: about six float32 numbers for each weight of one block, and the activations of a batch.

    Xu et al., ICLR 2024, https://arxiv.org/abs/2402.16880. There a softmax of sigmoids weighs the candidates, which
    cannot come above a sparsity of about 0.6; here it is the softmax of the paper's text, and it begins at the target.
    """
    found: dict[str, tuple[str, float, int]] = {}
    losses: list[Learnt] = []

    def learn(walked: WalkedBlock) -> None:
        sizes = {weight.name: weight.size for weight in walked.weights}
        shares = dict.fromkeys(sizes, seen.target)
        if walked.replay is not None and sizes and seen.target > 0:
            with torch.inference_mode(False), torch.enable_grad():
                learnt = _Block(seen, walked).learn()
            logger.info("besa: %s: block loss %.4g, learnt %.4g.", walked.name, learnt.uniform, learnt.learnt)
            losses.append(learnt)
            shares = learnt.sparsity
        with torch.no_grad():
            for weight in walked.weights:
                tensor = walked.tensor(weight)
                tensor.masked_fill_(~seen.keep(tensor, walked.statistics[weight.name], shares[weight.name]), 0)
        found.update({name: (place(name).block, shares[name], size) for name, size in sizes.items()})

    batches = seen.batches(BATCH, None)
    blocks = lambda blocks: progress(blocks, "Learning sparsities", "block", "optimum_dsa.prune")  # noqa: E731
    walk = walk_blocks(seen.model, seen.architecture, batches, reads={*seen.reads, "outputs"}, progress=blocks)
    masked_for_the_next(walk, learn)
    if losses:
        before, after = mean(one.uniform for one in losses), mean(one.learnt for one in losses)
        logger.info("besa: block losses %.4g before, %.4g learnt (mean of %d).", before, after, len(losses))
    return found


def by_learnt(measured: Mapping[str, tuple[str, float, int]], target: float, spread: float | None) -> dict[str, float]:
    """What was learnt, moved by one number in every block so that its mean is `target`; `spread` has no effect."""
    blocks: dict[str, list[str]] = {}
    for unit, (block, *_) in measured.items():
        blocks.setdefault(block, []).append(unit)
    found = {}
    for units in blocks.values():
        found |= at_target({unit: measured[unit][1:] for unit in units}, target)
    return {unit: found[unit] for unit in measured}


def at_target(wished: Mapping[str, tuple[float, int]], target: float) -> dict[str, float]:
    """Matrix -> sparsity, at exactly the mean `target`, of what is wished for and of the sizes."""
    sizes = {name: size for name, (_, size) in wished.items()}
    return dict(fit_to_budget({name: share for name, (share, _) in wished.items()}, sizes, target).sparsity)


class _Block:
    """One block, whose matrices have learnt masks."""

    def __init__(self, seen: Seen, walked: WalkedBlock):
        self.seen, self.walked, self.replay = seen, walked, walked.replay
        self.weights = walked.weights
        self.sizes = {weight.name: weight.size for weight in walked.weights}
        # Which candidate takes a weight: rows are ordered by the metric, and the order is never learnt.
        self.places = {weight.name: self._places(weight) for weight in walked.weights}
        candidates = torch.arange(LEVELS, dtype=torch.float32) / LEVELS
        self.candidates = candidates.to(walked.tensor(walked.weights[0]).device)
        start = -((self.candidates - seen.target) / WIDTH).square()
        self.logits = {name: start.clone().requires_grad_() for name in self.sizes}
        self.scale = sum(float(target.float().square().sum()) for target in self.replay.targets)

    def learn(self) -> Learnt:
        optimizer = torch.optim.Adam(self.logits.values(), lr=RATE)
        batches = len(self.replay.samples)
        for epoch in range(EPOCHS):
            generator = torch.Generator().manual_seed(epoch)
            for batch in torch.randperm(batches, generator=generator).tolist():
                optimizer.zero_grad()
                shares = {name: self._share(name) for name in self.sizes}
                mine = sum(share * self.sizes[name] for name, share in shares.items()) / sum(self.sizes.values())
                missed = ((mine - self.seen.target) / self.seen.target).square()
                masks = {name: self._mask(name, share) for name, share in shares.items()}
                # As a share of what all batches give, so that batches of any size count by their windows.
                (self._lost(batch, masks) * batches / self.scale + BUDGET * missed).backward()
                optimizer.step()
        with torch.no_grad():
            wished = {name: (float(self._share(name)), size) for name, size in self.sizes.items()}
            found = at_target(wished, self.seen.target)
            uniform, learnt = (self._loss(each) for each in (dict.fromkeys(found, self.seen.target), found))
        if not learnt < uniform:
            return Learnt(dict.fromkeys(found, self.seen.target), uniform, uniform)
        return Learnt(found, uniform, learnt)

    @torch.no_grad()
    def _places(self, weight: Weight) -> Tensor:
        """The first candidate that takes each weight of a row, (out_features, in_features) int32."""
        scores = self.seen.metric(self.walked.tensor(weight), self.walked.statistics[weight.name])
        order = scores.argsort(dim=1, stable=True)
        steps = torch.arange(scores.shape[1], device=scores.device) * LEVELS // scores.shape[1]
        return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, steps.int().expand_as(order))

    def _share(self, name: str) -> Tensor:
        """The sparsity of a matrix, (): the candidates' mean."""
        return (self.logits[name].softmax(0) * self.candidates).sum()

    def _mask(self, name: str, share: Tensor) -> Tensor:
        """1 where a weight stays, (out_features, in_features), with the gradient of the chance that it does."""
        # A weight at place k goes with every candidate above k.
        weights = self.logits[name].softmax(0)
        stays = weights.cumsum(0)[self.places[name]]
        hard = (self.places[name] >= share.detach() * LEVELS).to(stays.dtype)
        return hard - stays.detach() + stays

    def _lost(self, batch: int, masks: Mapping[str, Tensor]) -> Tensor:
        """Σ ‖masked block − dense block‖² over a batch, (); masks are (out_features, in_features)."""
        module, prefix = self.replay.module, f"{self.walked.name}."
        values = {
            name.removeprefix(prefix): value for name, value in _masked(self.weights, self.walked, masks).items()
        }

        def block(*args, **kwargs):
            return functional_call(module, values, args, kwargs)

        output = self.replay.run(batch, block=block).float()
        return (output - self.replay.targets[batch].float()).square().sum()

    def _loss(self, shares: Mapping[str, float]) -> float:
        """The whole loss at these sparsities, by the masks that a prune would make."""
        masks = {
            weight.name: self.seen.keep(
                self.walked.tensor(weight), self.walked.statistics[weight.name], shares[weight.name]
            )
            for weight in self.weights
        }
        return sum(float(self._lost(batch, masks)) for batch in range(len(self.replay.samples))) / self.scale


def _masked(weights: Sequence[Weight], walked: WalkedBlock, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter -> its masked value, of its own shape; experts of one parameter are put together again."""
    owners: dict[str, list[Weight]] = {}
    for weight in weights:
        owners.setdefault(f"{weight.module}.{weight.attribute}", []).append(weight)
    found = {}
    for name, own in owners.items():
        parameter: nn.Parameter = own[0].parameter(walked.model).detach()
        parts = {weight.expert: _stored(masks[weight.name].to(parameter.dtype), weight) for weight in own}
        if own[0].expert is None:
            found[name] = parameter * parts[None]
            continue
        stacked = own[0].stacked(parameter)
        whole = torch.stack([parts.get(number, torch.ones_like(part)) for number, part in enumerate(stacked)])
        found[name] = parameter * whole.view_as(parameter)
    return found


def _stored(mask: Tensor, weight: Weight) -> Tensor:
    """A mask, (out_features, in_features), as the weight is stored."""
    return mask.t() if weight.transposed else mask
