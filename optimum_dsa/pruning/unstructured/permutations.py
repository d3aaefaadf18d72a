"""Orders of channels for N:M patterns: which of them share a group, so that more of the score stays.

Every row takes `Channels` that can change places, and returns an order, (channels,) int64: place k is taken by channel
`order[k]`, and every M neighbouring places are a group, of which each row keeps the N highest scores. The fact `reads`
says what it needs of calibration beside what the scores need: "inputs" (the default) or "gram" (X·Xᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.registry import Registry
from .assignment import best_assignment


PERMUTATIONS = Registry("permutation")

RIA = "https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning"
ROUNDS, ENOUGH = 12, 1e-4  # of `exchange`: rounds over all members of the groups, and the gain that ends them
# Of `learned`: channels that are put in order together, steps, their rate, what divides the numbers before they are
# balanced, rounds of that, and the number that the order as it is begins with.
BLOCK, STEPS, RATE, TEMPERATURE, BALANCES, START = 64, 50, 0.02, 0.1, 5, 0.1
TOGETHER = 256  # groups among which members are assigned at once: the cost of an assignment grows with the cube
CHUNK = 2**18  # gains that are worked on at once: they stay in a processor's cache


def retained(scores: Tensor, kept: int, width: int) -> float:
    """The sum of the scores, (rows, channels), that stay where each row keeps the `kept` highest of every `width`."""
    groups = scores.unflatten(1, (-1, width))
    return groups.topk(kept, dim=2).values.sum(dtype=torch.float64).item()


@dataclass(frozen=True)
class Channels:
    """What the columns of a matrix hold, or of several places that have to be put in the same order.

    Attributes:
        scores (`Tensor`): (copies · rows, channels) float32, non-negative: the rows of one place after the other.
        kept (`int`): N of the pattern.
        width (`int`): M.
        weights (`Tensor`): (copies, rows, channels) float32, and
        moments (`Tensor`): (copies, channels, channels), X·Xᵀ of the inputs: for who reads "gram", `None` for others.
    """

    scores: Tensor
    kept: int
    width: int
    weights: Tensor | None = None
    moments: Tensor | None = None

    def retained(self, order: Tensor | slice = slice(None)) -> float:
        """The sum of the scores that stay with the channels in that order, (channels,)."""
        return retained(self.scores[:, order], self.kept, self.width)


@PERMUTATIONS.register(reference=RIA)
def ria(channels: Channels) -> Tensor:
    """Channels in the order of their sums dealt to the groups in turn, then one member of each group dealt anew.

    (channels,). The strongest channels do not meet in one group, where they
    would push each other out. A second step takes the first members out of all groups and assigns them to where they
    add most, the other members being where they are; then the second ones, and so on.

    Zhang et al., "Plug-and-Play", ICLR 2024, channel permutation: heuristic allocation and linear sum assignment.
    """
    dealt = channels.scores.sum(0).argsort(descending=True, stable=True).view(channels.width, -1).t()
    return _reassigned(channels, dealt).flatten()


@PERMUTATIONS.register(reference=RIA)
def exchange(channels: Channels) -> Tensor:
    """`ria`'s assignment repeated, from the better of its result and the order as it is, until it gains no more.

    (channels,). Each round assigns every member of the groups once, grouped by chance anew.
    """
    here = torch.arange(channels.scores.shape[1], device=channels.scores.device)
    order = max(here, ria(channels), key=channels.retained)
    generator, groups = torch.Generator().manual_seed(0), order.view(-1, channels.width)
    best = channels.retained(order)
    for _ in range(ROUNDS):
        chance = torch.rand(groups.shape, generator=generator).argsort(1).to(groups.device)
        groups = _reassigned(channels, groups.gather(1, chance))
        now = channels.retained(groups.flatten())
        if now - best <= ENOUGH * best:
            break
        best = now
    return groups.flatten()


def _reassigned(channels: Channels, groups: Tensor) -> Tensor:
    """`groups`, (groups, width) channels, after each member in turn was assigned to the groups anew.

    Never a lower score: that all stay where they are is one of the assignments.
    """
    scores, kept = channels.scores, channels.kept
    groups, parts = groups.clone(), -(-len(groups) // TOGETHER)
    for member in range(channels.width):
        others = torch.cat([groups[:, :member], groups[:, member + 1 :]], dim=1)
        # One more in a group stays where it beats the last that would stay without it, and pushes that one out.
        stronger = scores[:, others].topk(kept, dim=2).values[..., -1] if kept <= others.shape[1] else None
        for part in range(parts):
            own = groups[part::parts, member].clone()
            here = scores[:, own]
            threshold = torch.zeros_like(here) if stronger is None else stronger[:, part::parts]
            groups[part::parts, member] = own[best_assignment(_gains(here, threshold)).argsort()]
    return groups


def _gains(scores: Tensor, threshold: Tensor) -> Tensor:
    """Σ over rows of what a channel has beyond a group's threshold, both (rows, n): (n, n), [channel, group]."""
    gains = scores.new_zeros(scores.shape[1], threshold.shape[1])
    for own, theirs in zip(*(part.split(max(CHUNK // gains.numel(), 1)) for part in (scores, threshold))):
        gains += (own[:, :, None] - theirs[:, None, :]).clamp_min_(0).sum(0)
    return gains


@PERMUTATIONS.register(reference="https://arxiv.org/abs/2510.10136", reads="gram")
def learned(channels: Channels) -> Tensor:
    """Every 64 neighbouring channels put in order among themselves by gradients, from the order as it is.

    (channels,). Sinkhorn's balancing makes a matrix of numbers doubly stochastic, the highest entries make it a
    permutation, and the gradient goes through the former. What falls is ‖(W − Ŵ) X‖², Ŵ being the weights that the
    scores leave, as they are. The best order that was seen is returned.

    Zou et al., "PermLLM", 2025, https://arxiv.org/abs/2510.10136, block-wise learnable channel permutation; there the
    loss is the cosine of a layer's outputs, and an exact assignment makes the permutation.
    """
    count = channels.scores.shape[1]
    size = min(BLOCK, count) // channels.width * channels.width
    # Channels that fill no block stay where they are.
    inside = count // size * size
    order = torch.arange(count, device=channels.scores.device)
    order[:inside] = (_learn(channels, inside // size, size) + order[:inside:size, None]).flatten()
    return order


@torch.enable_grad()
def _learn(channels: Channels, blocks: int, size: int) -> Tensor:
    """The best orders, (blocks, size), of so many blocks of channels from the first on."""
    inside, width, weights, moments = blocks * size, channels.width, channels.weights, channels.moments
    scores = channels.scores.unflatten(0, (len(weights), -1))
    eye = torch.eye(size, device=scores.device)
    logits = (START * eye).repeat(blocks, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], RATE)
    total = ((weights @ moments) * weights).sum()
    best, least = torch.arange(size, device=scores.device).repeat(blocks, 1), torch.inf

    def moved(values: Tensor, how: Tensor) -> Tensor:
        """(..., channels) times a matrix (size, size) for every block."""
        parts = torch.einsum("crkb,kbp->crkp", values[..., :inside].unflatten(-1, (blocks, size)), how)
        return torch.cat([parts.flatten(-2), values[..., inside:]], dim=-1)

    for _ in range(STEPS):
        soft = logits / TEMPERATURE
        for _ in range(BALANCES):
            soft = soft - soft.logsumexp(2, keepdim=True)
            soft = soft - soft.logsumexp(1, keepdim=True)
        soft = soft.exp()
        place = _hardened(soft.detach())
        how = eye[place] + soft - soft.detach()  # [channel, place]
        with torch.no_grad():
            groups = moved(scores, eye[place]).unflatten(-1, (-1, width))
            stays = groups.topk(channels.kept, dim=-1).indices
            gone = torch.ones_like(groups).scatter_(-1, stays, 0.0).flatten(-2)
        lost = moved(moved(weights, how) * gone, how.transpose(1, 2))
        loss = ((lost @ moments) * lost).sum() / total
        if loss.item() < least:
            least, best = loss.item(), place.argsort(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


def _hardened(soft: Tensor) -> Tensor:
    """A place for every channel, (blocks, size) int64, all different, of matrices (blocks, size, size).

    The highest entry first, then the highest of what is left: an exact assignment takes 50 times as long.
    """
    left, size = soft.clone(), soft.shape[2]
    place, block = torch.empty_like(left[..., 0], dtype=torch.int64), torch.arange(len(soft), device=soft.device)
    for _ in range(size):
        channel, column = left.flatten(1).argmax(1).div(size, rounding_mode="floor"), left.flatten(1).argmax(1) % size
        place[block, channel] = column
        left[block, channel], left[block, :, column] = -1.0, -1.0
    return place
