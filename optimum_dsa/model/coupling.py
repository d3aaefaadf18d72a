"""Channels between the matrices of a block that can change places without changing what the block computes.

Found by wiring and not by name. The block is run with its matrices cut out: each gives numbers that are made up, and
what it is given is noted. Which channel depends on which is then seen from numbers that are changed, and channels are
interchangeable where equal numbers in all of them come out equal: those between gate, up and down, and within a head
those between v and o, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .architecture import Weight
from .calls import replaced_forwards
from .walk import WalkedBlock


# What a matrix gives instead of its outputs: (numbers, other numbers), both (..., out_features) -> the same shape.
_Change = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ChannelSet:
    """Channels of one coupling that can be put in any order among themselves.

    Attributes:
        columns (`Tensor`): (copies, size), columns of the consumers. One row for each place that reads the channels:
            query heads that share one head of values have to be put in the same order.
        rows (`Tensor`): (producers, size), rows of each producer.
    """

    columns: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Coupling:
    """Matrices whose rows (`producers`) make, channel by channel, the columns of others (`consumers`)."""

    producers: tuple[Weight, ...]
    consumers: tuple[Weight, ...]
    sets: tuple[ChannelSet, ...]


def find_couplings(walked: WalkedBlock) -> tuple[list[Coupling], dict[str, str]]:
    """The couplings of a block, and the weights whose columns have to stay where they are -> why.

    The block is run on one sample, without its matrices: twice for each matrix, and twice more for every binary digit
    of a producer's number of rows.
    """
    left = {weight.name: "experts of one parameter" for weight in walked.weights if weight.expert is not None}
    wiring = _Wiring(walked)
    made: dict[int, dict[str, Tensor]] = {}
    for name in wiring.weights:
        group, sources = wiring.reader(name)
        if group is not None:
            made.setdefault(group, {})[name] = sources
    couplings = []
    for group, consumers in wiring.groups().items():
        sets = _sets(wiring.alike(consumers[0], made[group]), list(made[group].values())) if group in made else ()
        if sets:
            weights = ([wiring.weights[name] for name in names] for names in (made[group], consumers))
            couplings.append(Coupling(*map(tuple, weights), sets))
        else:
            why = "channels differ in what is done to them" if group in made else "no matrix makes its inputs alone"
            left |= dict.fromkeys(consumers, why)
    unseen = {weight.name: "not run as a module" for weight in walked.weights if weight.name not in wiring.inputs}
    return couplings, unseen | left


@torch.no_grad()
def reorder_(walked: WalkedBlock, coupling: Coupling, orders: Sequence[Tensor]) -> None:
    """Put channels in another order, in place: weights, biases, and the statistics of what the consumers multiply.

    Args:
        orders: of every set of the coupling, (size,): place k is taken by the channel of place `order[k]`.
    """
    device = coupling.sets[0].columns.device
    columns = torch.arange(coupling.consumers[0].shape[1], device=device)
    rows = [torch.arange(weight.shape[0], device=device) for weight in coupling.producers]
    for places, order in zip(coupling.sets, orders, strict=True):
        columns[places.columns] = places.columns[:, order]
        for row, own in zip(rows, places.rows):
            row[own] = own[order]
    for weight in coupling.consumers:
        tensor = walked.tensor(weight)
        tensor.copy_(tensor[:, columns.to(tensor.device)])
        walked.changed(weight)
    for weight, row in zip(coupling.producers, rows):
        owner = walked.model.get_submodule(weight.module)
        walked.tensor(weight).copy_(walked.tensor(weight)[row.to(walked.tensor(weight).device)])
        walked.changed(weight)
        for name, parameter in owner.named_parameters(recurse=False):
            if name != weight.attribute and parameter.shape == row.shape:
                parameter.data.copy_(parameter.data[row.to(parameter.device)])
                walked.changes.add(f"{weight.module}.{name}")
    # Weights that share an input share its statistics, which are put in order once.
    shared = {id(found): found for weight in coupling.consumers if (found := walked.statistics.get(weight.name))}
    for statistics in shared.values():
        statistics.reorder_(columns.to(statistics.squared_sum.device))


@torch.no_grad()
def outputs_of(walked: WalkedBlock, weights: Sequence[Weight]) -> list[Tensor]:
    """What `weights` and the block as they are now give on one sample: float32, of any shapes."""
    found: list[Tensor] = []
    handles = [
        walked.model.get_submodule(weight.module).register_forward_hook(lambda *call: found.append(call[2].float()))
        for weight in weights
    ]
    try:
        rest = walked.run()
    finally:
        for handle in handles:
            handle.remove()
    return found + [tensor.float() for tensor in rest if tensor.is_floating_point()]


class _Rewired(Exception):
    """The block ran its matrices another time, or on other shapes, than at first (an expert was chosen)."""


class _Wiring:
    """Runs a block whose matrices give made-up numbers instead of their outputs.

    Attributes:
        weights: by name, those that can be cut out.
        inputs: weight -> its inputs in order, (..., in_features), when nothing was changed.
    """

    def __init__(self, walked: WalkedBlock):
        self.walked = walked
        modules = {weight.name: walked.model.get_submodule(weight.module) for weight in walked.weights}
        self.weights = {
            weight.name: weight
            for weight in walked.weights
            if weight.expert is None and not isinstance(modules[weight.name], nn.Embedding)
        }
        self._names, self._modules = list(self.weights), [modules[name] for name in self.weights]
        self._numbers: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._names}
        self._generator = torch.Generator().manual_seed(0)
        self._first = True
        self.inputs, self._rest = self.run({})
        self._first = False

    def run(self, changes: Mapping[str, _Change]) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Weight -> its inputs, (..., in_features) each, and all tensors that the block leaves behind."""
        seen: dict[str, list[Tensor]] = {}

        def make(index: int, forward: Callable) -> Callable:
            name = self._names[index]

            def replacement(*args, **kwargs):
                inputs = args[0] if args else next(iter(kwargs.values()))
                calls = seen.setdefault(name, [])
                calls.append(inputs)
                numbers, others = self._of(name, len(calls) - 1, inputs)
                # A copy: what follows may write into it.
                return changes[name](numbers, others) if name in changes else numbers.clone()

            return replacement

        with replaced_forwards(self._modules, make):
            rest = self.walked.run()
        return seen, rest

    def _of(self, name: str, number: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What a weight gives in its call `number` on `inputs`, (..., in_features), and other such numbers."""
        shape, known = (*inputs.shape[:-1], self.weights[name].shape[0]), self._numbers[name]
        if self._first:
            tensor = self.walked.tensor(self.weights[name])
            made = (torch.randn(shape, generator=self._generator).to(tensor) for _ in range(2))
            known.append(tuple(made))
        if number >= len(known) or known[number][0].shape != shape:
            raise _Rewired
        return known[number]

    def groups(self) -> dict[int, list[str]]:
        """Weights that are given one and the same input, by its identity; of those that run once."""
        found: dict[int, list[str]] = {}
        for name, calls in self.inputs.items():
            if len(calls) == 1:
                found.setdefault(id(calls[0]), []).append(name)
        return found

    def reader(self, name: str) -> tuple[int | None, Tensor | None]:
        """The one input that the outputs of a weight reach, by its identity, and where its channels come from.

        The latter is (in_features,), for every channel of the input the one row of the weight that it depends on.
        `None` where outputs reach anything else, or are mixed on the way.
        """
        rows, device = self.weights[name].shape[0], self.walked.tensor(self.weights[name]).device
        row, sources, group = torch.arange(rows, device=device), 0, None
        for digit in range(max((rows - 1).bit_length(), 1)):
            touched = []
            for value in (0, 1):
                try:
                    inputs, rest = self.run({name: partial(_where, (row >> digit & 1) == value)})
                except _Rewired:
                    return None, None
                reached = {id(self.inputs[one][0]) for one in inputs if _differ(self.inputs[one], inputs[one])}
                if _differ(self._rest, rest) or reached - {group} and (group is not None or len(reached) > 1):
                    return None, None
                group = next(iter(reached), group)
                touched.append(inputs)
            if group is None or group not in self.groups():
                return None, None
            reader = self.groups()[group][0]
            zero, one = (_channels(self.inputs[reader][0], inputs[reader][0]) for inputs in touched)
            # Every channel depends on rows with this digit or on rows without it, and on no others: with all digits
            # told, it depends on one row alone.
            if not (zero ^ one).all():
                return None, None
            sources = sources + (one.long() << digit)
        return group, sources

    def alike(self, reader: str, producers: Mapping[str, Tensor]) -> Tensor:
        """Kinds of input channels of a weight, (in_features,): equal where all producers giving equal rows tells none.

        Two heads attend to different tokens, and are of different kinds.
        """
        inputs, _ = self.run(dict.fromkeys(producers, lambda own, other: own[..., :1].expand_as(own).clone()))
        found = inputs[reader][0]
        columns = found.reshape(-1, found.shape[-1]).t().float()
        tolerance = 8 * torch.finfo(found.dtype).eps * columns.abs().max()
        kinds = torch.full((len(columns),), -1, device=columns.device)
        # So many heads no block has: what differs from channel to channel is found out soon.
        for kind in range(1024):
            missing = (kinds < 0).nonzero()
            if not len(missing):
                return kinds
            same = (columns - columns[missing[0]]).abs().amax(1) <= tolerance
            kinds[same & (kinds < 0)] = kind
        return torch.arange(len(columns), device=columns.device)


def _sets(kinds: Tensor, sources: Sequence[Tensor]) -> tuple[ChannelSet, ...]:
    """Channels that can change places, of an input whose channels are of `kinds`, (in_features,).

    `sources` tells, for every producer, the row that each of them depends on, (in_features,).
    """
    rows = torch.stack([source.to(kinds.device) for source in sources])
    channels, number = rows.unique(dim=1, return_inverse=True)
    # One row of the one producer stands with one row of the other, or they cannot be moved together.
    if any(len(row.unique()) != channels.shape[1] for row in rows):
        return ()
    read: dict[int, dict[int, int]] = {}
    for column, (channel, kind) in enumerate(zip(number.tolist(), kinds.tolist())):
        if kind in read.setdefault(channel, {}):
            return ()
        read[channel][kind] = column
    together: dict[tuple[int, ...], list[int]] = {}
    for channel, places in read.items():
        together.setdefault(tuple(sorted(places)), []).append(channel)
    sets = []
    for by, found in together.items():
        if len(found) > 1:
            # As they stand in the input: neighbours of an N:M group are neighbours here.
            found.sort(key=lambda channel: read[channel][by[0]])
            columns = torch.tensor([[read[channel][kind] for channel in found] for kind in by], device=kinds.device)
            sets.append(ChannelSet(columns, rows[:, columns[0]]))
    return tuple(sets)


def _where(rows: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """`own` with `other` in some `rows`, (out_features,) bool; (..., out_features) all three."""
    return torch.where(rows, other, own)


def _channels(before: Tensor, after: Tensor) -> Tensor:
    """Which channels of an input, (..., n), differ for some token, (n,) bool."""
    return (before != after).reshape(-1, before.shape[-1]).any(0)


def _differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether any of some tensors differs from its counterpart."""
    return len(before) != len(after) or any(
        own.shape != other.shape or not torch.equal(own, other) for own, other in zip(before, after)
    )
