"""Channels between the matrices of a block that can change places without changing what the block computes.

Found by wiring and not by name. Channels are interchangeable where equal numbers in all of them come out equal: those
between gate, up and down, and within a head those between v and o, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .architecture import Weight
from .walk import WalkedBlock
from .wiring import Wiring


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

    The block is run on one sample, without its matrices: once for each matrix and each input, and twice for every
    binary digit of a producer's number of rows.
    """
    left = {weight.name: "experts of one parameter" for weight in walked.weights if weight.expert is not None}
    wiring = Wiring(walked)
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
