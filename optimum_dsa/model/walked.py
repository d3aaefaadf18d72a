"""A block at which a walk stands, and what it hands out there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .architecture import Block, UnprunableError, Weight
from .dense import Replay
from .observer import Observer
from .statistics import LayerStatistics


@dataclass(frozen=True)
class Group:
    """Weights of a block that multiply one and the same input, with its statistics."""

    weights: tuple[Weight, ...]
    statistics: dict[str, LayerStatistics]


@dataclass(frozen=True)
class WalkedBlock:
    """The block at which a walk stands: its weights on their device, and the statistics of their inputs.

    `rewritten()` says that a block of which nothing is pruned yet computes the same as before with other weights
    (channels in another order): they are the dense ones from there on.

    Attributes:
        needed (`bool`): whether somebody else will ask for the statistics: then `done` leaves them alone.
        sampled (`bool`): whether the statistics are of one batch and without X·Xᵀ, because those of every group are
            collected when its turn comes.
    """

    block: Block
    statistics: dict[str, LayerStatistics]
    model: nn.Module = field(repr=False)
    changes: set[str] = field(repr=False)
    # weights -> statistics of their inputs in the block as it is now; None where nothing is run
    again: Callable[[Sequence[Weight]], dict[str, LayerStatistics]] | None = field(default=None, repr=False)
    replay: Replay | None = None  # where "outputs" are read; not of the weights outside the blocks
    # runs the block as it is now on one sample -> all tensors that it leaves behind, see `BlockCalls.everything_of`;
    # None where nothing is run
    run: Callable[[], list[Tensor]] | None = field(default=None, repr=False)
    rewritten: Callable[[], None] = field(default=lambda: None, repr=False)
    needed: bool = False
    sampled: bool = False

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.block.weights

    def state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the block that a checkpoint has and that is here, live, by full name."""
        found = {}
        for name in self.block.modules:
            found |= self.model.get_submodule(name).state_dict(prefix=f"{name}.")
        # of an offloaded model that is not run, the weights alone are brought in
        return {name: value for name, value in found.items() if isinstance(value, Tensor) and not value.is_meta}

    def tensor(self, weight: Weight) -> Tensor:
        """The live weight, (out_features, in_features); the walk sees what is written to it."""
        return weight.tensor(self.model)

    def become(self, values: Mapping[str, Tensor]) -> None:
        """Copy `values` into the tensors of these names, of `state`, and their shapes."""
        live = self.state()
        for name, value in values.items():
            # What is as it should be (norms, mostly) need not be written back to a disk. As bytes, in which -0 is
            # not 0, and which every type has.
            mine, wanted = (tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (live[name], value))
            if torch.equal(mine, wanted):
                continue
            live[name].copy_(value)
            owner, _, attribute = name.rpartition(".")
            if attribute in dict(self.model.get_submodule(owner).named_parameters(recurse=False)):
                self.changed(name)

    def groups(self, true_sequential: bool = False) -> Iterator[Group]:
        """The weights in groups that share an input, in the order in which the block runs them.

        With `true_sequential` each group but the first gets statistics that are collected when its turn comes, from
        the block as the groups before it were left: one more forward pass a group. Where the walk was told of it
        (`sampled`), the first group's are collected then, too, and a pass ends where nothing of the group comes after.
        """
        shared: dict[int | tuple[str, str], list[Weight]] = {}
        # Statistics stand in the order in which inputs were seen: the block runs in it, and its code may name another.
        order = {name: number for number, name in enumerate(self.statistics)}
        for weight in sorted(self.weights, key=lambda weight: order.get(weight.name, 0)):
            # Weights that share an input share one and the same sums, see `Observer`. The experts of one parameter
            # stay together: they run beside each other, and one alone may see no token.
            statistics = self.statistics.get(weight.name)
            own = id(statistics and statistics.squared_sum)
            key = own if weight.expert is None else (weight.module, weight.attribute)
            shared.setdefault(key, []).append(weight)
        for number, weights in enumerate(shared.values()):
            later = true_sequential and (number > 0 or self.sampled) and self.again is not None
            # Held by whoever is given them alone: those of the next group would stand beside them otherwise.
            yield Group(tuple(weights), self.again(weights) if later else self._statistics_of(weights))

    def _statistics_of(self, weights: Sequence[Weight]) -> dict[str, LayerStatistics]:
        return {weight.name: self.statistics[weight.name] for weight in weights if weight.name in self.statistics}

    def done(self, weight: Weight, group: Group) -> None:
        """Say that `weight`, of `group`, needs its statistics no more; those that nobody else needs are freed.

        X·Xᵀ of a wide matrix is larger than the matrix, and what updates derive of it is twice that.
        """
        if self.needed:
            return
        self.statistics.pop(weight.name, None)
        found = group.statistics.pop(weight.name, None)
        if found is not None and not any(found.shares(other) for other in group.statistics.values()):
            # Whoever gave the statistics to the walk may hold them still, and then without what is derived of them.
            found.release_()

    def changed(self, weight: Weight | str) -> None:
        """Say that `tensor(weight)`, or a parameter by its full name, was written to, so that it is written back."""
        self.changes.add(weight if isinstance(weight, str) else f"{weight.module}.{weight.attribute}")


def checked(block: Block, observer: Observer) -> dict[str, LayerStatistics]:
    """The block's statistics, finite and, where experts are watched, really seen."""
    # All experts of a parameter together: that no token reached one of them is nothing unusual.
    fused: dict[str, int] = {}
    for weight in block.weights:
        if weight.expert is not None:
            parameter = f"{weight.module}.{weight.attribute}"
            seen = observer.statistics.get(weight.name)
            fused[parameter] = fused.get(parameter, 0) + (seen.tokens if seen else 0)
    for parameter, tokens in fused.items():
        if tokens == 0:
            owner = parameter.rpartition(".")[0]
            size = sum(weight.size for weight in block.weights if weight.module == owner)
            raise UnprunableError(
                f"{parameter}: what its experts multiply could not be observed; leave them dense with "
                f"exclude=['{owner.rpartition('.')[2]}'], {size / block.size:.1%} of this block, or choose a method "
                "that needs no inputs."
            )
    statistics = observer.finish(block)
    for weight in block.weights:
        # The sums show it as soon as one number of any input was not finite.
        if not statistics[weight.name].squared_sum.isfinite().all():
            raise ValueError(
                f"The input of {weight.name} holds NaN or infinities; try another dtype (bfloat16 or float32) or "
                "other text. Blocks before it may already be pruned in memory: load the model again."
            )
    return statistics
