"""Which rows of a block's matrices reach which columns of others, seen from numbers that are changed, and not by name.

The block is run with its matrices cut out: each gives numbers that are made up, and what it is given is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .calls import replaced_forwards
from .walked import WalkedBlock


# What a matrix gives instead of its outputs: (numbers, other numbers), both (..., out_features) -> the same shape.
_Change = Callable[[Tensor, Tensor], Tensor]


class _Rewired(Exception):
    """The block ran its matrices another time, or on other shapes, than at first (an expert was chosen)."""


class Wiring:
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
        try:
            group = self._reached_by(name)
            sources = None if group is None else self._sources(name, group, self._rows(name))
        except _Rewired:
            return None, None
        return (None, None) if sources is None else (group, sources)

    def touched(self, name: str) -> tuple[int, Tensor] | None:
        """The one input that the outputs of a weight reach, by identity, and which of its channels each row reaches.

        The latter is (n, in_features), the rows that every channel depends on, if that is one of each of n equal
        parts of all rows; else (out_features, in_features) bool, which costs a run for every row. `None` where
        outputs reach anything else, or nothing.
        """
        try:
            if (group := self._reached_by(name, _without_maps)) is None:
                return None
            rows = self._rows(name)
            for parts in (1, 2):  # of two parts is what holds gates and what they gate
                sources = [self._sources(name, group, part) for part in rows.chunk(parts)]
                if all(found is not None for found in sources):
                    return group, torch.stack(sources)
            return group, torch.stack([self._channels_of(name, group, rows == row) for row in rows])
        except _Rewired:
            return None

    def _rows(self, name: str) -> Tensor:
        """The numbers of a weight's rows, (out_features,), where the weight is."""
        weight = self.weights[name]
        return torch.arange(weight.shape[0], device=self.walked.tensor(weight).device)

    def _reached_by(self, name: str, counted: Callable[[list[Tensor]], list[Tensor]] = list) -> int | None:
        """The one input that the outputs of a weight reach, and nothing of what is `counted` of the block's own."""
        inputs, rest = self.run({name: lambda own, other: other.clone()})
        reached = {id(self.inputs[one][0]) for one in inputs if _differ(self.inputs[one], inputs[one])}
        if len(reached) != 1 or _differ(counted(self._rest), counted(rest)):
            return None
        (group,) = reached
        return group if group in self.groups() else None

    def _channels_of(self, name: str, group: int, changed: Tensor) -> Tensor:
        """The channels of an input, (in_features,) bool, that the `changed` rows reach, (out_features,) bool."""
        return self.reached({name: changed}, self.groups()[group][0])

    def _sources(self, name: str, group: int, part: Tensor) -> Tensor | None:
        """The one row of a `part`, (n,), that each channel of an input depends on, (in_features,), if it is one.

        Rows of the part are numbered in binary, and each digit costs two runs.
        """
        rows, number = self._rows(name), torch.arange(len(part), device=part.device)
        found = torch.zeros((), dtype=torch.long, device=part.device)
        for digit in range(max((len(part) - 1).bit_length(), 1)):
            chosen = (part[(number >> digit & 1) == value] for value in (0, 1))
            zero, one = (self._channels_of(name, group, torch.isin(rows, some)) for some in chosen)
            # Every channel depends on rows with this digit or on rows without it, and on no others: with all digits
            # told, it depends on one row alone.
            if not (zero ^ one).all():
                return None
            found = found + (one.long() << digit)
        return part[found]

    def reached(self, changes: Mapping[str, Tensor], reader: str) -> Tensor:
        """The channels of a weight's input, (in_features,) bool, that depend on any of some rows of others.

        `changes` tells these rows by weight, (out_features,) bool each.
        """
        inputs, _ = self.run({name: partial(_where, rows) for name, rows in changes.items()})
        return _channels(self.inputs[reader][0], inputs[reader][0])

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


def _without_maps(rest: Sequence[Tensor]) -> list[Tensor]:
    """What a block leaves behind, of any shapes, without how much tokens attend to each other: nobody needs that.

    It is (samples, heads, length, length); what is first of all is the block's output, (samples, length, ...).
    """
    length = rest[0].shape[1:2]
    return [tensor for tensor in rest if tensor.dim() != 4 or tensor.shape[2:] != (*length, *length)]


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
