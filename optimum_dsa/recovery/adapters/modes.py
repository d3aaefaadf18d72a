"""What a sparse adapter adds to a sparse weight: functions of its two factors that leave every zero a zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...common.registry import Registry


GROUP_SIZE = 32  # columns of a group, as formats of quantised weights have them


@dataclass(frozen=True)
class Mode:
    """One way to train a sparse weight through two small factors.

    Attributes:
        delta (`Callable`): (weight, a, b, scaling) -> what is added to the weight, (out_features, in_features), zero
            where the weight is; with weight (out_features, in_features), a (rank, in_features) and b (out_features,
            rank), or (out_features, 1) for a column. Differentiable in a and b.
        column (`bool`): whether b is one column, whatever the rank.
        start (`Callable`): sets a and b, in place, after LoRA's own initialisation (a random, b zero), so that the
            delta is zero; `None` where it is zero already.
        scaled (`bool`): whether the scaling alpha / rank enters.
        grouped (`bool`): whether delta takes `group_size`, of the adapter's config, as a further argument.
    """

    delta: Callable[..., Tensor]
    column: bool = False
    start: Callable[[Tensor, Tensor], None] | None = None
    scaled: bool = True
    grouped: bool = False


def mask(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """LoRA's product where the weight is not zero: s · BA ⊙ [W ≠ 0], (out_features, in_features)."""
    return (b @ a) * (weight != 0) * scaling


def scale(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """What makes W the product W ⊙ BA: s · W ⊙ (BA - 1), with s = 1; (out_features, in_features)."""
    return weight * ((b @ a) - 1) * scaling


def spp(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s · W ⊙ (b · Repeat(a)): a factor per row, times one per column and group of rows; row i is in group ⌊i·r/m⌋.

    b is (out_features, 1), other shapes as in `Mode`.
    """
    # Groups of nearly one size: the rank need not divide the rows.
    rows = torch.arange(len(weight), device=a.device) * len(a) // len(weight)
    return weight * (a[rows] * b) * scaling


def grouped(weight: Tensor, a: Tensor, b: Tensor, scaling: float, group_size: int = GROUP_SIZE) -> Tensor:
    """s · BĀ ⊙ [W ≠ 0], Ā being A with every row's mean over `group_size` columns in a row in the place of each.

    So a row of the weight changes by one number in every group of its columns: where a group is stored on a grid with
    an offset of its own, that number goes into the offset, and no code changes.

    Shapes as in `Mode`.
    """
    columns = torch.arange(a.shape[1], device=a.device) // group_size
    # The last group may be shorter than the rest.
    sizes = torch.bincount(columns).to(a)
    means = a.new_zeros(len(a), len(sizes)).index_add(1, columns, a) / sizes
    return (b @ means)[:, columns] * (weight != 0) * scaling


def _start_at_one(a: Tensor, b: Tensor) -> None:
    """BA = 1, in place: a (rank, in_features), b (out_features, rank)."""
    # With every entry 1/√r, as published, all ranks get one gradient and stay one rank.
    nn.init.ones_(a[:1])
    nn.init.ones_(b[:, :1])


MODES = Registry("mode")

MODES.add("mask", Mode(mask), reference="https://arxiv.org/abs/2312.15230")
MODES.add("scale", Mode(scale, start=_start_at_one, scaled=False), reference="https://arxiv.org/abs/2312.15230")
MODES.add("grouped", Mode(grouped, grouped=True), reference="https://arxiv.org/abs/2309.14717")
MODES.add("spp", Mode(spp, column=True), reference="https://arxiv.org/abs/2405.16057")
