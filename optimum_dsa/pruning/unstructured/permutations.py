"""Orders of channels for N:M patterns: which of them share a group, so that more of the score stays.

Every row takes `scores`, (rows, channels) float32, non-negative, of the channels that can change places, and N and M
of the pattern; it returns an order, (channels,) int64: place k is taken by channel `order[k]`, and every M
neighbouring places are a group, of which each row keeps the N highest scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.registry import Registry
from .assignment import best_assignment


PERMUTATIONS = Registry("permutation")

RIA = "https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning"
ROUNDS, ENOUGH = 12, 1e-4  # of `exchange`: rounds over all members of the groups, and the gain that ends them
# Of `learned`: channels that are put in order together, steps, rate, first and last temperature, Sinkhorn's rounds.
BLOCK, STEPS, RATE, TEMPERATURES, BALANCES = 64, 50, 0.1, (1.0, 0.1), 5
TOGETHER = 128  # groups among which members are assigned at once: the cost of an assignment grows with the cube
CHUNK = 2**18  # gains that are worked on at once: they stay in a processor's cache


def retained(scores: Tensor, kept: int, width: int) -> float:
    """The sum of the scores, (rows, channels), that stay where each row keeps the `kept` highest of every `width`."""
    groups = scores.unflatten(1, (-1, width))
    return groups.topk(kept, dim=2).values.sum(dtype=torch.float64).item()


@PERMUTATIONS.register(reference=RIA)
def ria(scores: Tensor, kept: int, width: int) -> Tensor:
    """Channels in the order of their sums dealt to the groups in turn, then one member of each group dealt anew.

    `scores` is (rows, channels), the result (channels,). The strongest channels do not meet in one group, where they
    would push each other out. A second step takes the first members out of all groups and assigns them to where they
    add most, the other members being where they are; then the second ones, and so on.

    Zhang et al., "Plug-and-Play", ICLR 2024, channel permutation: heuristic allocation and linear sum assignment.
    """
    dealt = scores.sum(0).argsort(descending=True, stable=True).view(width, -1).t()
    return _reassigned(scores, dealt, kept, range(width)).flatten()


@PERMUTATIONS.register(reference=RIA)
def exchange(scores: Tensor, kept: int, width: int) -> Tensor:
    """`ria`'s assignment repeated, from the better of its start and the order as it is, until it gains no more.

    (rows, channels) -> (channels,). Each round assigns every member of the groups once, grouped by chance anew.
    """
    here = torch.arange(scores.shape[1], device=scores.device)
    order = max(here, ria(scores, kept, width), key=lambda order: retained(scores[:, order], kept, width))
    generator, groups = torch.Generator().manual_seed(0), order.view(-1, width)
    best = retained(scores[:, order], kept, width)
    for _ in range(ROUNDS):
        chance = torch.rand(groups.shape, generator=generator).argsort(1).to(groups.device)
        groups = _reassigned(scores, groups.gather(1, chance), kept, range(width))
        now = retained(scores[:, groups.flatten()], kept, width)
        if now - best <= ENOUGH * best:
            break
        best = now
    return groups.flatten()


def _reassigned(scores: Tensor, groups: Tensor, kept: int, members: Sequence[int]) -> Tensor:
    """`groups`, (groups, width) channels, after each of `members` in turn was assigned to the groups anew.

    Never a lower score: that all stay where they are is one of the assignments.
    """
    groups, parts = groups.clone(), -(-len(groups) // TOGETHER)
    for member in members:
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


@PERMUTATIONS.register(reference="https://arxiv.org/abs/2510.10136")
def learned(scores: Tensor, kept: int, width: int) -> Tensor:
    """A soft permutation within every 64 neighbouring channels, trained by gradients and hardened at every step.

    (rows, channels) -> (channels,). Sinkhorn's balancing makes a matrix of numbers doubly stochastic, an assignment
    makes it a permutation, and the gradient goes through the former. What is maximised is the score that stays; the
    publication minimises the distance of a layer's outputs instead. The best order that was seen is returned.

    Zou et al., "PermLLM", 2025, https://arxiv.org/abs/2510.10136, block-wise learnable channel permutation.
    """
    block = max(BLOCK // width * width, width)
    whole = scores.shape[1] // block * block
    parts = [scores[:, :whole].unflatten(1, (-1, block))] if whole else []
    parts += [scores[:, None, whole:]] if whole < scores.shape[1] else []
    orders, start = [], 0
    for part in parts:
        first = start + torch.arange(part.shape[1], device=scores.device) * part.shape[2]
        orders.append((_learn(part.transpose(0, 1), kept, width) + first[:, None]).flatten())
        start += part.shape[1] * part.shape[2]
    return torch.cat(orders)


@torch.enable_grad()
def _learn(scores: Tensor, kept: int, width: int) -> Tensor:
    """The best orders, (blocks, size), of the channels of `scores`, (blocks, rows, size)."""
    size = scores.shape[2]
    logits = torch.zeros(len(scores), size, size, device=scores.device, requires_grad=True)
    best = torch.arange(size, device=scores.device).repeat(len(scores), 1)
    most = torch.full((len(scores),), -torch.inf, device=scores.device)
    optimizer = torch.optim.Adam([logits], RATE)
    eye, total = torch.eye(size, device=scores.device), scores.sum()
    first, last = TEMPERATURES
    for step in range(STEPS):
        soft = logits + eye * (step == 0)  # the order as it is comes first
        soft = soft / (first * (last / first) ** (step / STEPS))
        for _ in range(BALANCES):
            soft = soft - soft.logsumexp(2, keepdim=True)
            soft = soft - soft.logsumexp(1, keepdim=True)
        soft = soft.exp()
        place = _hardened(soft.detach())
        hard = eye[place]  # [channel, place]
        permuted = scores @ (hard + soft - soft.detach())
        groups = permuted.unflatten(2, (-1, width))
        stays = groups.topk(kept, dim=3).values.sum((1, 2, 3))
        better = stays.detach() > most
        most = torch.where(better, stays.detach(), most)
        best = torch.where(better[:, None], place.argsort(1), best)
        optimizer.zero_grad()
        (-stays.sum() / total).backward()
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
