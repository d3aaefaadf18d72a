"""Published allocators that have to run the model: ECoFLaP, ALS and NeuronAL. BESA, which learns, stands in `besa`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...common.progress import progress
from ...model.architecture import Weight
from ...model.calls import feed
from ...model.gradients import check_has_loss, loss_of
from ...model.inputs import kind_of
from ...model.walk import WalkedBlock, walk_blocks
from .layout import place
from .whole import Seen, masked_for_the_next


logger = logging.getLogger(__name__)

ECOFLAP, NEURONAL = "https://arxiv.org/abs/2310.02998", "https://arxiv.org/abs/2411.07066"
ALS = "https://openreview.net/forum?id=Jup0qZxH7U"

WINDOWS = {"ecoflap": 32, "als": 16, "neuronal": 16}  # of calibration, the first
TOKENS = 512  # of these windows, evenly spread, between which redundancy is looked for
# Half-widths that NeuronAL tries.
WIDTHS = (0.01, 0.02, 0.03, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12, 0.15, 0.20, 0.25)


# -- ECoFLaP: zeroth-order gradients


@torch.no_grad()
def slopes_of_units(seen: Seen, step: float = 1e-3) -> dict[str, tuple[float, int]]:
    """Unit -> the mean over windows of |L(W + εz) − L(W − εz)| ÷ 2ε, z being normal noise, and how many weights.

    No gradient is taken: two forward passes of the model a unit and window, and the memory of one unit's weights. The
    published code draws the noise matrix by matrix; here it is that of the unit at once, which costs as many passes
    fewer as a unit has matrices.

    Sung et al., 2023, https://arxiv.org/abs/2310.02998, eq. 4.
    """
    check_has_loss(seen.model, "an allocation")
    kind, batches = kind_of(seen.model), seen.batches(1, WINDOWS["ecoflap"])
    found = {}
    for number, (unit, weights) in enumerate(
        progress(list(seen.units.items()), "Slopes", "unit", "optimum_dsa.prune")
    ):
        tensors = [weight.tensor(seen.model) for weight in weights]
        before, total = [tensor.clone() for tensor in tensors], 0.0
        try:
            for window, batch in enumerate(batches):
                losses = []
                for sign in (1, -1):
                    # The same noise for both signs, made anew, and another for every window.
                    generator = torch.Generator().manual_seed(1000 * number + window)
                    for tensor, value in zip(tensors, before):
                        noise = torch.randn(value.shape, generator=generator).to(value.device)
                        tensor.copy_(value.float() + sign * step * noise)
                    losses.append(float(loss_of(seen.model, batch, kind)))
                total += abs(losses[0] - losses[1]) / (2 * step)
        finally:
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)
        found[unit] = total / len(batches), sum(weight.size for weight in weights)
    return found


def by_slopes(measured: Mapping[str, tuple[float, int]], target: float, spread: float | None) -> dict[str, float]:
    """Every unit keeps what the highest sparsity leaves, and of the rest a share in proportion to its slope.

    The highest sparsity is `target` + `spread`, 0.1 as published. Units that are full give what is over to the others.
    """
    slopes, sizes = torch.tensor(list(measured.values()), dtype=torch.float64).unbind(1)
    highest = min(target + (0.1 if spread is None else spread), 1.0)
    kept, goal = sizes * (1 - highest), float((1 - target) * sizes.sum())
    # Slopes that are all 0 tell nothing.
    slopes = slopes if slopes.sum() > 0 else torch.ones_like(slopes)
    while goal - kept.sum() > 1e-6 * goal:
        free = torch.where(kept < sizes, slopes, 0.0)
        if free.sum() == 0:
            free = (kept < sizes).double()
        kept = torch.minimum(kept + free / free.sum() * (goal - kept.sum()), sizes)
    return dict(zip(measured, (1 - kept / sizes).tolist()))


# -- ALS: redundancy between layers


@torch.no_grad()
def gram_of_tokens(seen: Seen) -> dict[str, tuple[str, Tensor, Tensor, int]]:
    """Unit -> its block, K = X·Xᵀ of the tokens that go into the block and into the unit, of norm 1, and its size.

    (tokens, tokens) each; of the first 16 windows 512 tokens are looked at. ‖X_iᵀX_j‖² is ⟨K_i, K_j⟩, so that inputs
    of different widths are compared. What is not given every token (a routed expert) counts as its block.

    Li & Lee, NeurIPS 2024, Adaptive Layer Sparsity, https://openreview.net/forum?id=Jup0qZxH7U.
    """
    batches = seen.batches(4, WINDOWS["als"])
    rows: dict[str, list[Tensor]] = {}
    handles = []

    def note(name: str):
        def hook(module, args, kwargs):
            value = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
            if value is not None and value.is_floating_point():
                rows.setdefault(name, []).append(value.reshape(-1, value.shape[-1]))

        return hook

    kept: dict[str, list[Tensor]] = {}
    names = {unit: weights[0].module for unit, weights in seen.units.items()}
    watched = {block.name for block in seen.architecture.blocks if not block.name.startswith("(")} | set(
        names.values()
    )
    modules = dict(seen.model.named_modules())
    try:
        for name in watched & modules.keys():
            handles.append(modules[name].register_forward_pre_hook(note(name), with_kwargs=True))
        for batch in batches:
            feed(seen.model, batch)
            _keep_some(rows, kept, max(TOKENS // len(batches), 1))
    finally:
        for handle in handles:
            handle.remove()
    grams = {name: _gram(parts) for name, parts in kept.items()}
    # Of all windows, where a routed expert may have been given all tokens of some.
    most = max(len(gram) for gram in grams.values())
    whole = {name: gram for name, gram in grams.items() if len(gram) == most}
    last, found = next(reversed(whole.values())), {}
    for unit, weights in seen.units.items():
        block = place(unit).block
        of_block = whole.get(block, whole.get(names[unit], last))
        found[unit] = block, of_block, whole.get(names[unit], of_block), sum(weight.size for weight in weights)
    return found


def _keep_some(rows: dict[str, list[Tensor]], kept: dict[str, list[Tensor]], number: int) -> None:
    """Move `number` rows, evenly spread, of what modules were given in a batch, (tokens, in_features), to `kept`."""
    most = max(sum(map(len, parts)) for parts in rows.values())
    for name, parts in rows.items():
        together = torch.cat(parts)
        # Of one that was given other tokens than the rest nothing is comparable.
        if len(together) == most:
            chosen = torch.linspace(0, most - 1, min(number, most)).round().long()
            kept.setdefault(name, []).append(together[chosen.to(together.device)].float().cpu())
    rows.clear()


def _gram(parts: Sequence[Tensor]) -> Tensor:
    """X·Xᵀ of rows, (tokens, in_features) in all, divided by its Frobenius norm."""
    rows = torch.cat(list(parts))
    gram = rows @ rows.t()
    return gram / gram.norm().clamp_min(torch.finfo(torch.float32).tiny)


def by_redundancy(
    measured: Mapping[str, tuple[str, Tensor, Tensor, int]], target: float, spread: float | None
) -> dict[str, float]:
    """What is kept, as a linear programme: most of Σ q_i c_i under the budget, every unit within `spread` of it.

    With ρ_i the redundancy of i with the others and μ the mean of RM, w_i = exp(−ρ_i ÷ μ) and c_i is the mean of w_j
    from i to the last. First of blocks, then of the matrices in each. The half-width is 0.2 as published: 30 to 70 %
    at half.
    """
    width = min(0.2 if spread is None else spread, target, 1 - target)
    blocks: dict[str, list[str]] = {}
    for unit, (block, *_) in measured.items():
        blocks.setdefault(block, []).append(unit)
    of_blocks = [measured[units[0]][1] for units in blocks.values()]
    sizes = [sum(measured[unit][3] for unit in units) for units in blocks.values()]
    shares = dict(zip(blocks, _programme(of_blocks, sizes, target, width)))
    found = {}
    for block, units in blocks.items():
        # Of what a block keeps no matrix loses more than half.
        inner = min(width, shares[block], (1 - shares[block]) / 2)
        own = [measured[unit][2] for unit in units], [measured[unit][3] for unit in units]
        found |= dict(zip(units, _programme(*own, shares[block], inner)))
    return {unit: found[unit] for unit in measured}


def _programme(grams: Sequence[Tensor], sizes: Sequence[int], target: float, width: float) -> list[float]:
    """The sparsities that solve it: all at a bound but one, for the gain of a weight is the same all along a unit."""
    if len(grams) == 1:
        return [target]
    flat = torch.stack([gram.flatten() for gram in grams]).double()
    related = flat @ flat.t()
    redundancy = related.sum(1) - related.diagonal()
    independent = (-redundancy / related.mean().clamp_min(1e-12)).exp()
    behind = independent.flip(0).cumsum(0).flip(0)
    worth = behind / torch.arange(len(grams), 0, -1) / torch.tensor(sizes)
    found = [target + width] * len(grams)
    left = width * sum(sizes)
    for unit in worth.argsort(descending=True, stable=True).tolist():
        given = min(2 * width * sizes[unit], left)
        found[unit] -= given / sizes[unit]
        left -= given
    return found


# -- NeuronAL: the ramp under which activations change least


@torch.no_grad()
def best_ramp(seen: Seen) -> dict[str, tuple[float, float]]:
    """Unit -> its depth, and the half-width of the ramp under which what matrices are given changes least.

    For each of 13 half-widths the model is pruned block after block, and Σ over matrices ‖a ÷ Σa − a′ ÷ Σa′‖₂ ÷ n is
    taken, a and a′ being the norms of a matrix's n inputs in the dense block and in the pruned one. The rows of a
    matrix all lose the same: the published second step, which tells them apart, is left out.

    Cunegatti et al., 2024, https://arxiv.org/abs/2411.07066, eq. 3.
    """
    batches, changes = seen.batches(8, WINDOWS["neuronal"]), {}
    depths = {unit: block.depth for block in seen.architecture.blocks for unit in block.units(seen.granularity)}
    for width in progress(WIDTHS, "Ramps", "ramp", "optimum_dsa.prune"):
        if width <= min(seen.target, 1 - seen.target):
            changes[width] = _change_under(seen, batches, width)
            logger.info("neuronal: half-width %g, inputs change by %.4g.", width, changes[width])
    best = min(changes, key=changes.get, default=0.0)
    return {unit: (depth, best) for unit, depth in depths.items()}


def _change_under(seen: Seen, batches: Sequence[Mapping[str, Tensor]], width: float) -> float:
    total = 0.0

    def prune(walked: WalkedBlock) -> None:
        nonlocal total
        if walked.again is None:  # outside the blocks
            return
        sparsity = seen.target + width * (2 * walked.block.depth - 1)
        dense = {weight.name: walked.statistics[weight.name].input_norm for weight in walked.weights}
        for weight in walked.weights:
            tensor = walked.tensor(weight)
            tensor.masked_fill_(~seen.keep(tensor, walked.statistics[weight.name], sparsity), 0)
        total += _moved(dense, walked.again(walked.weights), walked.weights)

    masked_for_the_next(walk_blocks(seen.model, seen.architecture, batches, reads=seen.reads), prune)
    return total


def _moved(dense: Mapping[str, Tensor], pruned: Mapping, weights: Sequence[Weight]) -> float:
    """Σ over matrices of how far the norms of their inputs, (in_features,) each, moved as shares of their sum."""
    total = 0.0
    for weight in weights:
        before, after = dense[weight.name], pruned[weight.name].input_norm
        shares = [norms / norms.sum().clamp_min(torch.finfo(torch.float32).tiny) for norms in (before, after)]
        total += float((shares[0] - shares[1]).norm()) / len(before)
    return total


def by_ramp(measured: Mapping[str, tuple[float, float]], target: float, spread: float | None) -> dict[str, float]:
    """Sparsity rising linearly with depth, within the half-width that was found best, or `spread`."""
    return {
        unit: target + (best if spread is None else spread) * (2 * depth - 1)
        for unit, (depth, best) in measured.items()
    }
