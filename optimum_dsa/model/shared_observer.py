"""Statistics over the batches of several processes, with the bits that one process would give them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from ..common.ranks import Ranks
from .architecture import UnprunableError, Weight
from .observer import Observer
from .statistics import LayerStatistics


logger = logging.getLogger(__name__)

LARGE = ("gram", "drift", "lack")  # sums of which each process adds a share; the others are vectors, and everybody's


def own_batches(
    batches: Sequence[Mapping[str, Tensor]], real: Sequence[Tensor | None], ranks: Ranks
) -> tuple[list[Mapping[str, Tensor]], list[Tensor | None], int]:
    """The batches of this process, with what is `real` in each, and how many are another's and not to be counted.

    They are dealt out in turn, so that all of a round are looked at at once and added in their order. Who would have
    none runs the first along: there is no walk without a batch.
    """
    if ranks.is_first and len(batches) % ranks.count:
        _warn_of_waiting(len(batches), ranks.count)
    own = slice(ranks.index, None, ranks.count) if ranks.index < len(batches) else slice(0, 1)
    return list(batches[own]), list(real[own]), int(ranks.index >= len(batches))


@cache
def _warn_of_waiting(batches: int, processes: int) -> None:
    """Say once that the batches cannot be divided evenly; a prune has several walks."""
    logger.warning(
        "%d batches on %d processes: in the last round %d of them wait; a smaller batch_size (--batch-size) divides "
        "them better, and changes the last bits.",
        batches,
        processes,
        processes - batches % processes,
    )


def as_first(statistics: dict[str, LayerStatistics], ranks: Ranks) -> dict[str, LayerStatistics]:
    """Statistics in the order, and shared by the weights, as in those of the first process."""
    if ranks.alone:
        return statistics
    leaders: dict[int, str] = {}
    shared = [(name, leaders.setdefault(id(found), name)) for name, found in statistics.items()]
    return {name: statistics[leader] for name, leader in ranks.of_first(shared)}


class Parts:
    """Stands in for the statistics of a weight while a batch is run: the sums of each of its inputs apart."""

    def __init__(self, make: Callable[[], LayerStatistics]):
        self.make, self.parts = make, []

    def empty(self) -> Parts:
        return Parts(self.make)

    def update_(self, inputs: Tensor) -> None:
        """Note inputs, (..., in_features)."""
        self.parts.append(self.make())
        self.parts[-1].update_(inputs)

    def pair_(self, inputs: Tensor, dense: Tensor) -> None:
        """Note the inputs that were noted last beside those of the dense model, (..., in_features) both."""
        self.parts[-1].pair_(inputs, dense)

    def lack_(self, inputs: Tensor, missing: Tensor) -> None:
        """Note the inputs that were noted last, (..., in_features), and what is missing, (..., out_features)."""
        self.parts[-1].lack_(inputs, missing)


@dataclass(frozen=True)
class _Told:
    """What a process says of one part: its numbers, and the shapes of its sums by name."""

    tokens: int
    paired: int
    lacking: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, part: LayerStatistics) -> _Told:
        names = (name for name in ("squared_sum", "sum", *LARGE) if getattr(part, name) is not None)
        return cls(part.tokens, part.paired, part._lacking, {name: tuple(getattr(part, name).shape) for name in names})

    def vectors(self) -> list[str]:
        """The sums that everybody adds."""
        names = [name for name in self.shapes if name not in LARGE]
        return [name for name in names if not (name == "squared_sum" and "gram" in self.shapes)]


@dataclass
class _Total:
    """The sums of a weight's input as far as they are added: whole vectors, and this process's share of the rest."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: int = 0
    paired: int = 0
    lacking: int = 0

    def count(self, told: _Told) -> None:
        self.tokens += told.tokens
        self.paired += told.paired
        self.lacking += told.lacking
        self.shapes |= told.shapes

    def add(self, name: str, more: Tensor) -> None:
        # To zeros, as one process does it.
        self.sums[name] = self.sums[name].add_(more) if name in self.sums else more + 0.0


class SharedObserver(Observer):
    """Collects statistics of this process's batches, and has those of all in the end, the same on every process.

    The sums of a batch are made where it is run, and added in the order of batches. Of X·Xᵀ each process adds a share
    of the entries, so that no one holds more than the sums of its own batch, a share of the total, and one matrix on
    its way. Who shares inputs with whom is learnt from the first batch of all.
    """

    def __init__(self, ranks: Ranks, gram: bool, mean: bool):
        super().__init__(gram, mean)
        self.ranks = ranks
        self._devices: dict[str, torch.device] = {}  # weight -> where its statistics are wanted
        self._merged = False
        self._held: list[dict[str, Parts]] = []  # of batches that are not added yet: weight -> its sums
        self._totals: dict[str, _Total] = {}  # by the first of the weights that share them
        self._leader: dict[str, str] = {}  # weight -> the first of those that it shares its inputs with

    def _statistics(self, weight: Weight, device: torch.device | str) -> LayerStatistics | Parts:
        if self._merged:  # nobody gave it anything
            return super()._statistics(weight, device)
        self._devices.setdefault(weight.name, torch.device(device))
        return Parts(partial(LayerStatistics, weight.shape[1], device, self.gram, with_sum=self.mean))

    def over(self, batches: Sequence[int], run: Callable[[int], None]) -> None:
        """Have `run` watch every batch of this process; afterwards the statistics are those of all processes."""
        left, sequences = list(batches), 0
        # After the first, as it tells who shares. With X·Xᵀ after each: those of several would take memory.
        step = 1
        while True:
            now, left, error = left[:step], left[step:], None
            before = self.sequences
            try:
                for number in now:
                    run(number)
                    self._hold()
            except Exception as raised:  # noqa: BLE001 - whatever it is, it is raised on all
                error = raised
            told = self.ranks.gather((self._facts(), self.sequences - before, bool(left)), error)
            self._add([facts for facts, _, _ in told])
            sequences += sum(more for _, more, _ in told)
            if not any(more for _, _, more in told):
                break
            step = 1 if self.gram else max(len(left), 1)
        self._merge(sequences)

    def _hold(self) -> None:
        """The batch that was run is over."""
        self._end_batch()
        self._held.append(self.statistics)
        self.statistics = {}

    def _facts(self) -> list[tuple[dict[str, str], dict[str, list[_Told]]]]:
        """Of every batch that is held: weight -> whose statistics it has, in order; and what these are."""
        found = []
        for held in self._held:
            first: dict[int, str] = {}
            given = {name: first.setdefault(id(parts), name) for name, parts in held.items()}
            found.append((given, {name: list(map(_Told.of, held[name].parts)) for name in first.values()}))
        return found

    def _add(self, told: Sequence[list]) -> None:
        """Add what the processes hold to the totals, round by round, in the order of the processes."""
        vectors = self._vectors(told)
        for number in range(max(map(len, told))):
            batches = {rank: facts[number] for rank, facts in enumerate(told) if number < len(facts)}
            for given, _ in batches.values():
                self._learn(given)
            names = dict.fromkeys(self._leader[name] for given, _ in batches.values() for name in given)
            for name in names:
                self._add_parts(name, number, batches, vectors)
        self._held.clear()
        for name, leader in self._leader.items():
            self._source.setdefault(name, leader)

    def _vectors(self, told: Sequence[list]) -> list[dict[tuple[int, str, int, str], Tensor]]:
        """Of every process its vectors, by batch, weight, part and name."""
        keys = [
            {
                (number, name, at, field): part.shapes[field][0]
                for number, (_, parts) in enumerate(facts)
                for name, each in parts.items()
                for at, part in enumerate(each)
                for field in part.vectors()
            }
            for facts in told
        ]
        own = [
            getattr(self._held[number][name].parts[at], field) for number, name, at, field in keys[self.ranks.index]
        ]
        flat = torch.cat([vector.to(self.ranks.wire) for vector in own]) if own else torch.empty(0)
        found = self.ranks.gather_flat(flat, [sum(each.values()) for each in keys])
        return [dict(zip(each, flat.split(list(each.values())))) for each, flat in zip(keys, found)]

    def _learn(self, given: Mapping[str, str]) -> None:
        """Note who shares with whom in a batch, the first of all; in a later one they still have to.

        Raises:
            UnprunableError: they do not.
        """
        begins = not self._leader
        for name, leader in given.items():
            self._leader.setdefault(name, leader if begins else name)
        for name, leader in self._leader.items():
            if leader != name and given.get(name) != given.get(leader):
                raise UnprunableError(
                    f"{name} and {leader} are given the same input at first and different ones later; leave one of "
                    f"them dense with exclude=['{name}'], or prune in one process."
                )

    def _add_parts(self, name: str, number: int, batches: Mapping[int, tuple], vectors: Sequence[Mapping]) -> None:
        """Add all that is held of weight `name` in the batches of one round."""
        total = self._totals.setdefault(name, _Total())
        # By the name that the process itself has them under.
        told = {rank: (given[name], parts[given[name]]) for rank, (given, parts) in batches.items() if name in given}
        rows = [(rank, at, part) for rank, (_, parts) in told.items() for at, part in enumerate(parts)]
        for rank, at, part in rows:
            total.count(part)
            for field_name in part.vectors():
                more = vectors[rank][number, told[rank][0], at, field_name]
                total.add(field_name, more)
        for field_name in LARGE:
            having = [(rank, at) for rank, at, part in rows if field_name in part.shapes]
            # All at once where each has one, and else one after the other, in their order.
            several = len({rank for rank, _ in having}) < len(having)
            for group in [[each] for each in having] if several else [having] * bool(having):
                self._scatter(total, field_name, name, number, dict(group))

    def _scatter(self, total: _Total, field_name: str, name: str, number: int, senders: Mapping[int, int]) -> None:
        """Add this process's share of the sums `field_name` of `senders`, process -> number of the part."""
        mine = None
        if self.ranks.index in senders:
            part = self._held[number][name].parts[senders[self.ranks.index]]
            mine = getattr(part, field_name).reshape(-1)
            setattr(part, field_name, None)  # freed as soon as it is sent
        size = torch.Size(total.shapes[field_name]).numel()
        for more in self.ranks.scatter(mine, list(senders), size):
            total.add(field_name, more)

    def _merge(self, sequences: int) -> None:
        """The totals as statistics, which weights that share an input share."""
        self.sequences, self._merged = sequences, True
        made: dict[str, LayerStatistics] = {}
        for name, total in self._totals.items():
            # Of an expert that no token of this process has reached, where the rest are.
            device = self._devices.get(name) or next(iter(self._devices.values()), self.ranks.wire)
            sums = {}
            for field_name, shape in total.shapes.items():
                if field_name in LARGE:
                    share = total.sums.pop(field_name)
                    sums[field_name] = self.ranks.joined(share, torch.Size(shape).numel()).view(shape).to(device)
                elif field_name in total.sums:
                    sums[field_name] = total.sums.pop(field_name).to(device)
            if "gram" in sums:
                sums["squared_sum"] = sums["gram"].diagonal().clone()
            made[name] = LayerStatistics(
                total.shapes["squared_sum"][0],
                device,
                self.gram,
                total.tokens,
                paired=total.paired,
                with_sum=self.mean,
                _lacking=total.lacking,
                **sums,
            )
        self.statistics = {name: made[leader] for name, leader in self._leader.items()}
