"""Importance of structures: what goes with each, one number; the least important go first.

Every row takes the [`Parts`] of all structures of a kind in a block, and returns (structures,) float32, non-negative,
on their device. None of them changes its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ...common.registry import Registry
from ...model.statistics import DAMPING, LayerStatistics
from .gradients import Products
from .structure import ENTIRE
from .wholes.usage import Usage


# The fact `reads` says what a row needs of calibration: "nothing", "inputs", "mean" or "gram", see `reads_of`; and
# `gradients`, where there is one, what it needs of a pass backwards, see `collect_products`. `kinds` says of which
# structures it is, where it is not of channels and heads.
IMPORTANCES = Registry("importance")
CHANNELS = ("ffn", "head", "kv_group")
EXPERTS = ("expert",)
OWNED = (*CHANNELS, *EXPERTS)  # what owns matrices, or parts of them
# What is not of channels and heads -> the row that scores it where the one that was chosen does not.
OF_WHOLES = {"expert": "reap", **dict.fromkeys(("block", *ENTIRE), "block_influence")}


def importance_of(kind: str, chosen: str) -> str:
    """The row that scores structures of a kind where `chosen` was asked for: that, or the kind's own.

    Raises:
        ValueError: there is none.
    """
    kinds = IMPORTANCES.fact(chosen, "kinds", CHANNELS)
    if kind in kinds:
        return chosen
    if kind not in OF_WHOLES:
        raise ValueError(
            f"importance={chosen!r} is of {' and '.join(map(repr, kinds))}, and {kind!r} is to go; take another one."
        )
    return OF_WHOLES[kind]


def importances_of(cut: Mapping[str, Any]) -> list[str]:
    """The rows that score what goes by a `DSAStructuredConfig`, as JSON values, each once."""
    chosen, kinds = cut.get("importance"), cut.get("structures") or ()
    if chosen not in IMPORTANCES:  # a file may say anything
        return [str(chosen)]
    known = (*IMPORTANCES.fact(chosen, "kinds", CHANNELS), *OF_WHOLES)
    return list(dict.fromkeys(importance_of(kind, chosen) for kind in kinds if kind in known)) or [chosen]


def chosen_by(cut: Mapping[str, Any]) -> str:
    """What chose what goes by a `DSAStructuredConfig`, as JSON values, in words: importances, or a learner."""
    rows = " and ".join(importances_of(cut))
    return f"{cut['learner']}, which began with {rows}" if cut.get("learner") else rows


def is_made_up_for(cut: Mapping[str, Any]) -> bool:
    """Whether what stays of a part is fitted, by a `DSAStructuredConfig` as JSON values: of wholes nothing stays."""
    return not set(cut.get("structures") or ()) <= {*OF_WHOLES}


@dataclass(frozen=True)
class Parts:
    """What the structures of one kind in one block own.

    Attributes:
        makes (`Sequence[Tensor]`): by matrix, the rows that make each: (structures, rows, in_features).
        reads (`Sequence[Tensor]`): by matrix, the columns that read it: (structures, columns, out_features).
        columns (`Tensor`): (structures, columns) int64, where these are in the input of the matrices that read.
        statistics (`LayerStatistics`, *optional*): of that input; `None` where nothing is read.
        products (`Sequence[Products]`): by matrix, weights times gradients; empty where no row reads them.
        name (`str`): what chance begins with, for the row that draws.
        usage (`Usage`, *optional*): what experts or blocks do to their tokens.
    """

    makes: Sequence[Tensor]
    reads: Sequence[Tensor]
    columns: Tensor
    statistics: LayerStatistics | None = None
    damping: float = DAMPING
    products: Sequence[Products] = ()
    name: str = ""
    usage: Usage | None = None


@IMPORTANCES.register(reference="https://arxiv.org/abs/2305.11627", reads="nothing", kinds=(*OWNED, "block", *ENTIRE))
def random(parts: Parts) -> Tensor:
    """Drawn from (0, 1], (structures,): what every other row has to be better than. The same for the same name.

    The baseline of Ma et al., 2023, "LLM-Pruner", https://arxiv.org/abs/2305.11627.
    """
    generator = torch.Generator().manual_seed(crc32(parts.name.encode()))
    return (1 - torch.rand(len(parts.columns), generator=generator)).to(parts.columns.device)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2305.11627", reads="nothing", kinds=OWNED)
def magnitude(parts: Parts) -> Tensor:
    """Σ w² over all that a structure owns, (structures,).

    The "l2" importance of Ma et al., 2023, "LLM-Pruner", https://arxiv.org/abs/2305.11627.
    """
    return sum(part.float().square().sum(dim=(1, 2)) for part in (*parts.makes, *parts.reads))


@IMPORTANCES.register(reference="https://arxiv.org/abs/1608.08710", reads="nothing", kinds=OWNED)
def magnitude_l1(parts: Parts) -> Tensor:
    """Σ |w| over all that a structure owns, (structures,).

    Li et al., 2016, "Pruning Filters for Efficient ConvNets", https://arxiv.org/abs/1608.08710.
    """
    return sum(part.float().abs().sum(dim=(1, 2)) for part in (*parts.makes, *parts.reads))


@IMPORTANCES.register(reference="https://arxiv.org/abs/2312.11983", reads="inputs")
def wanda_sp(parts: Parts) -> Tensor:
    """Σ |W_ij| · ‖x_j‖ over the columns that read a structure, (structures,).

    Wanda's score, summed over what goes together: An et al., 2023, https://arxiv.org/abs/2312.11983.
    """
    norms = parts.statistics.input_norm[parts.columns]
    return sum((part.float().abs().sum(dim=2) * norms).sum(dim=1) for part in parts.reads)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2312.11983", reads="mean")
def flap(parts: Parts) -> Tensor:
    """Σ var(x_j) · ‖W_j‖² over the columns that read a structure, (structures,): what its mean cannot stand in for.

    var is over all tokens. An et al., 2023, "FLAP", https://arxiv.org/abs/2312.11983.
    """
    found = parts.statistics
    mean = found.mean
    variance = (found.squared_sum / max(found.tokens, 1) - mean.square()).clamp_min_(0)[parts.columns]
    return sum((part.float().square().sum(dim=2) * variance).sum(dim=1) for part in parts.reads)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2302.04089", reads="gram")
def obs(parts: Parts) -> Tensor:
    """The error of the best refit without a structure, (structures,): tr(W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ).

    S are its columns, and H is X·Xᵀ, damped. Each is taken to go alone.

    Kurtic et al., 2023, "ZipLM", https://arxiv.org/abs/2302.04089.
    """
    factor = parts.statistics.inverse_factor(parts.damping).factor  # U, H⁻¹ being Uᵀ·U
    own = factor[:, parts.columns].permute(1, 0, 2)  # (structures, in_features, columns)
    inner = own.transpose(1, 2) @ own
    return sum((part.float() * torch.linalg.solve(inner, part.float())).sum(dim=(1, 2)) for part in parts.reads)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2503.09657", reads="gram")
def tyr(parts: Parts) -> Tensor:
    """Σ W_S · (H·W)_S + ½ `obs`, (structures,): first and second order of what its columns S do, H being X·Xᵀ, damped.

    Where columns cancel each other the first order is negative; all are raised then, so that the least is 0.

    The local criterion of Li et al., 2025, "Týr-the-Pruner", https://arxiv.org/abs/2503.09657, whose code has it so.
    With `rounds` and a refit H·W is, of what is left, what it was of the whole matrix, as there.
    """
    chosen, moment = parts.columns.flatten(), parts.statistics.second_moment
    hessian = moment[chosen[:, None], chosen]
    hessian.diagonal().add_(parts.damping * moment.diagonal().mean())
    found = obs(parts) / 2
    for part in parts.reads:
        weight = part.float().flatten(0, 1)
        found = found + (weight * (hessian @ weight)).view(*part.shape).sum(dim=(1, 2))
    return found - found.min().clamp_max(0)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2305.11627", reads="nothing", kinds=OWNED, gradients="elements")
def taylor(parts: Parts) -> Tensor:
    """Σ |w · g| over all that a structure owns, g being the gradient of the mean loss, (structures,).

    First order by element, "param_first": Ma et al., 2023, "LLM-Pruner", https://arxiv.org/abs/2305.11627.
    """
    return sum(found.elements.sum(1) for found in parts.products)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2305.11627", reads="nothing", kinds=OWNED, gradients="vectors")
def taylor_vector(parts: Parts) -> Tensor:
    """Σ |Σ w · g|, the inner sum over each row or column that a structure owns, (structures,).

    First order by vector, "vectorize": Ma et al., 2023, "LLM-Pruner", https://arxiv.org/abs/2305.11627.
    """
    return sum(found.first.abs().sum(1) for found in parts.products)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2305.11627", reads="nothing", kinds=OWNED, gradients="vectors")
def taylor_second(parts: Parts) -> Tensor:
    """Σ w² · F over all that a structure owns, F being the mean over samples of g_j², (structures,).

    Second order by element, "param_second": Ma et al., 2023, "LLM-Pruner", https://arxiv.org/abs/2305.11627.
    """
    return sum(found.second.sum(1) for found in parts.products)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2305.11627", reads="nothing", kinds=OWNED, gradients="mixed")
def taylor_mix(parts: Parts) -> Tensor:
    """Σ |w · g − ½ w² · F| over all that a structure owns, (structures,).

    Both orders by element, "param_mix": Ma et al., 2023, "LLM-Pruner", https://arxiv.org/abs/2305.11627.
    """
    return sum(found.mixed.sum(1) for found in parts.products)


@IMPORTANCES.register(reference="https://arxiv.org/abs/2412.15127", reads="nothing", kinds=OWNED, gradients="mixed")
def saap(parts: Parts) -> Tensor:
    """½ V / mean(V) + ½ E / mean(E), (structures,): importance by vector and by element, made one.

    V = Σ |Σ w·g − ½ mean_j (Σ w·g_j)²| over the rows and columns that a structure owns, E is `taylor_mix`. Weighing
    both as tasks of unknown noise, min over σ of Σ I / (2σ²) + log σ, has the solution σ² = mean(I), and none is zero
    unless both are; `saap_learned` descends to it.

    Adaptive importance fusion of SAAP, 2024, https://arxiv.org/abs/2412.15127, as excerpts of it tell.
    """
    return sum(each / (2 * mean) for each, mean in _both_of_saap(parts))


@IMPORTANCES.register(
    "saap_learned", reference="https://arxiv.org/abs/2412.15127", reads="nothing", kinds=OWNED, gradients="mixed"
)
def saap_learned(parts: Parts) -> Tensor:
    """½ V / σ_V² + ½ E / σ_E², (structures,), both σ learned: `saap` where they have come to their end.

    Each descends ½ mean(I) / σ² + log σ by 100 steps, 1 of the gradient by log σ² each, from the larger mean on.

    Adaptive importance fusion of SAAP, 2024, https://arxiv.org/abs/2412.15127, as excerpts of it tell; the weighing is
    that of Kendall et al., 2018, https://arxiv.org/abs/1705.07115.
    """
    both = _both_of_saap(parts)
    largest, found = max(mean for _, mean in both), 0
    for each, mean in both:
        place = torch.zeros_like(mean)  # log σ², of importances over the larger of both means
        for _ in range(100):
            place = place - (1 - mean / largest * (-place).exp()) / 2
        found = found + each / (2 * largest * place.exp())
    return found


def _both_of_saap(parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """Importance by vector and by element, (structures,) each, with its mean, a scalar."""
    vector = sum((found.first - found.first_squared / 2).abs().sum(1) for found in parts.products)
    smallest = torch.finfo(torch.float32).tiny
    return [(each, each.mean().clamp_min(smallest)) for each in (vector, taylor_mix(parts))]


@IMPORTANCES.register(
    reference="https://arxiv.org/abs/2510.13999", reads="nothing", kinds=("expert",), observes="usage"
)
def reap(parts: Parts) -> Tensor:
    """The mean over its tokens of g_e(x) · ‖f_e(x)‖, (structures,): what an expert adds where it is chosen.

    g_e is its weight as the mixture has it, renormalised where that does so. Lasby et al., 2025, "REAP",
    https://arxiv.org/abs/2510.13999.
    """
    return parts.usage.output / parts.usage.tokens.clamp_min(1)


@IMPORTANCES.register(
    reference="https://arxiv.org/abs/2310.01334", reads="nothing", kinds=("expert",), observes="usage"
)
def router_frequency(parts: Parts) -> Tensor:
    """The share of all choices that fall on an expert, (structures,).

    The baseline of usage: Li et al., 2023, "Merge, Then Compress", https://arxiv.org/abs/2310.01334.
    """
    return parts.usage.tokens / parts.usage.tokens.sum().clamp_min(1)


@IMPORTANCES.register(
    reference="https://arxiv.org/abs/2403.03853", reads="nothing", kinds=("block", *ENTIRE), observes="usage"
)
def block_influence(parts: Parts) -> Tensor:
    """The mean over tokens of 1 − cos(what a block is given, what it makes of it), (structures,).

    Men et al., 2024, "ShortGPT", https://arxiv.org/abs/2403.03853, eq. 1. Of a block's attention or MLP it is 1 −
    cos(what the block makes without it, what it makes), after He et al., 2024, "What Matters in Transformers?",
    https://arxiv.org/abs/2406.15786, who take the stream just before and behind the part.
    """
    return parts.usage.output / parts.usage.tokens.clamp_min(1)
