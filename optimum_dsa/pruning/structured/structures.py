"""The structures of a model: what can be cut out of it so that smaller matrices are left, found by wiring.

A structure is a channel of an MLP, a head, or a group of query heads with the head of keys and values that they share.
It owns rows of the matrices that make it, and columns of those that read it. With these columns zero it is silenced:
the model in which it is cut out gives the same. An expert is one as well, silenced by a router that never chooses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture, Weight
from ...model.modeling_per_layer import rows_of
from ...model.walk import WalkedBlock, walk_blocks
from ...model.wiring import Wiring
from .slicing import trouble
from .structure import Cut, Found, Structures
from .tied import tied_structures, why_not_alone
from .wholes.experts import expert_structures


def find_structures(model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]) -> Found:
    """Every structure of a model, by unit.

    Args:
        batch (`Mapping[str, Tensor]`): inputs of the model by name, one short sample: (1, length, ...). What reaches
            what is seen from it, and 16 tokens are enough.
    """
    structures: dict[str, Structures] = {}
    left: dict[str, str] = dict(architecture.dense)
    known: dict[tuple, _Looked] = {}
    tried: dict[tuple, str | None] = {}
    bound: set[str] = set()
    for walked in walk_blocks(model, architecture, [batch], sequential=False):
        if walked.run is None:
            left |= {weight.name: "outside the blocks" for weight in walked.weights}
            continue
        wiring, name = Wiring(walked), walked.name
        alike = tuple((weight.name.removeprefix(name), weight.shape) for weight in walked.weights)
        # Blocks of one make are wired alike: what was found in one is tried in the next, which costs a run each.
        looked = known.get(alike, _Looked())
        if not looked.every or not all(shape.of(name).holds(wiring) for shape in looked.every):
            looked = _looked_at(walked, wiring)
            if looked.sure:
                known[alike] = looked
        every = [shape.of(name).structures(walked, wiring.weights) for shape in looked.every]
        outside = [every[place] for place in looked.outside]
        left |= {name + relative: why for relative, why in looked.troubles.items()}
        for found in expert_structures(walked, architecture.dense):
            owned = _owned(walked, found, left)
            if (key := (*alike, len(every))) not in tried:
                tried[key] = trouble(walked, found)
            if tried[key] is None:
                left = {weight: why for weight, why in left.items() if weight not in owned}
                every.append(found)
            else:
                left |= dict.fromkeys(owned, f"experts: {tried[key]}")
        for found in every:
            if found.unit in structures:  # a block with two of a kind (a cross-attention) has one unit of each
                number = sum(unit.startswith(found.unit) for unit in structures)
                named = replace(found, unit=f"{found.unit}.{number}")
            else:
                named = found
            structures[named.unit] = named
            bound |= {named.unit} if any(found is each for each in outside) else set()
    structures, troubles = tied_structures(model, architecture, structures, bound, batch)
    owned = {cut.tensor for each in structures.values() for cut in each.cuts}
    return Found(structures, {name: why for name, why in left.items() if name not in owned} | troubles)


def _owned(walked: WalkedBlock, structures: Structures, names: Iterable[str]) -> set[str]:
    """Which weights experts own: whole ones, and their rows of the router."""
    cuts, wholes = {cut.tensor for cut in structures.cuts}, tuple(f"{whole}." for whole in structures.wholes)
    weights = (name for name in names if name.startswith(walked.name))
    return {name for name in weights if name.partition("[")[0] in cuts or (wholes and name.startswith(wholes))}


@dataclass(frozen=True)
class _Shape:
    """How the structures of one kind lie in the matrices of a block, whose names are full ones or relative.

    Attributes:
        makers: weight -> the rows of every structure, (structures, rows).
        readers: weights whose columns are those of `columns`, (structures, columns).
        slopes: heads of which the block is given a row each, and can keep those of its own; else 0.
    """

    kind: str
    heads: tuple[int, int]
    makers: Mapping[str, Tensor]
    readers: tuple[str, ...]
    columns: Tensor
    slopes: int = 0

    def of(self, block: str, before: str = "") -> _Shape:
        """The same in another block, where the names of this one begin with `before`."""

        def named(name: str) -> str:
            return block + name.removeprefix(before)

        makers = {named(name): rows for name, rows in self.makers.items()}
        return replace(self, makers=makers, readers=tuple(map(named, self.readers)))

    def holds(self, wiring: Wiring) -> bool:
        """Whether every other structure of a block is what rows of these makers reach, and all that they reach."""
        groups = [set(names) for names in wiring.groups().values()]
        if not set(self.makers) <= set(wiring.weights) or set(self.readers) not in groups:
            return False
        expected = torch.zeros(wiring.weights[self.readers[0]].shape[1], dtype=torch.bool, device=self.columns.device)
        expected[self.columns[::2].flatten()] = True
        changes = {}
        for name, rows in self.makers.items():
            changes[name] = torch.zeros(wiring.weights[name].shape[0], dtype=torch.bool, device=rows.device)
            changes[name][rows[::2].flatten()] = True
        return torch.equal(wiring.reached(changes, self.readers[0]), expected)

    def structures(self, walked: WalkedBlock, weights: Mapping[str, Weight]) -> Structures:
        makes = []
        for name, rows in self.makers.items():
            weight = weights[name]
            makes.append(Cut(name, 1 if weight.transposed else 0, rows))
            for other, value in walked.model.get_submodule(weight.module).named_parameters(recurse=False):
                if value.shape == (weight.shape[0],):
                    makes.append(Cut(f"{weight.module}.{other}", 0, rows))
        makes += self._by_head(walked, {weights[name].module.rpartition(".")[0] for name in self.makers})
        reads = [Cut(name, 0 if weights[name].transposed else 1, self.columns) for name in self.readers]
        return Structures(
            f"{walked.name}:{self.kind}", self.kind, tuple(makes), tuple(reads), self.heads, slopes=self.slopes
        )

    def _by_head(self, walked: WalkedBlock, owners: set[str]) -> Iterator[Cut]:
        """Vectors and tables with a number for each query head, such as sinks of attention, that these modules own."""
        number, queries = len(self.columns), self.heads[0]
        for owner in sorted(owners) if queries else ():
            for name, value in walked.model.get_submodule(owner).named_parameters(recurse=False):
                if value.shape == (number * queries,):
                    size = self.columns.shape[1] // queries
                    yield Cut(f"{owner}.{name}", 0, self.columns[:, ::size] // size)
            for name, part in walked.model.get_submodule(owner).named_children():
                if isinstance(part, nn.Embedding) and part.embedding_dim == number * queries:
                    size = self.columns.shape[1] // queries
                    yield Cut(f"{owner}.{name}.weight", 1, self.columns[:, ::size] // size)


@dataclass(frozen=True)
class _Looked:
    """What can be cut in a block, by names relative to its own.

    Attributes:
        every: what can go.
        outside: places in it of what cannot go from this block alone, as something that blocks share counts it.
        troubles: weights of which nothing can go from it alone -> why.
        sure: whether what holds of one block holds of those that are wired alike.
    """

    every: Sequence[_Shape] = ()
    outside: Sequence[int] = ()
    troubles: Mapping[str, str] = field(default_factory=dict)
    sure: bool = True


def _looked_at(walked: WalkedBlock, wiring: Wiring) -> _Looked:
    every, outside, why, sure = [], [], {weight.name: _why(weight) for weight in walked.weights}, True
    for shape in _shapes(wiring):
        names = (*shape.makers, *shape.readers)
        structures = shape.structures(walked, wiring.weights)
        found, counted = trouble(walked, structures), _counted_outside(walked, structures)
        if (table := _has_table(walked, structures)) or (found and counted):
            slopes = 0 if table else _given_to(walked, structures)
            alone = slopes and trouble(walked, replace(structures, slopes=slopes)) is None
            outside.append(len(every))
            every.append(replace(shape.of("", walked.name), slopes=slopes if alone else 0))
        if found or table:
            why |= dict.fromkeys(names, counted or found or why_not_alone(structures))
            continue
        # Where this block makes what is shared (T5's first), the next ones tell.
        sure = sure and counted is None
        every.append(shape.of("", walked.name))
        for name in names:
            why.pop(name, None)
    troubles = {name.removeprefix(walked.name): reason for name, reason in why.items()}
    return _Looked(every, outside, troubles, sure)


def _counted_outside(walked: WalkedBlock, structures: Structures) -> str | None:
    """Why no head can go from one block alone, where the blocks share a tensor with a row for each; else `None`."""
    number = _given_to(walked, structures)
    # What a block was given stands behind what it gives.
    if number and any(tensor.dim() > 2 and number in tensor.shape[:2] for tensor in walked.run()[1:]):
        return why_not_alone(structures)
    return None


def _given_to(walked: WalkedBlock, structures: Structures) -> int:
    """For how many heads a block is given rows, if it is: of one whose heads were cut, for those that it had once."""
    known = rows_of(walked.model.get_submodule(walked.name))
    return known[0] if known and structures.heads[0] else len(structures) * structures.heads[0]


def _has_table(walked: WalkedBlock, structures: Structures) -> bool:
    """Whether structures own columns of an embedding, which other blocks may have of this one (T5's first)."""
    owners = (walked.model.get_submodule(cut.tensor.rpartition(".")[0]) for cut in structures.makes)
    return any(isinstance(owner, nn.Embedding) for owner in owners)


def _shapes(wiring: Wiring) -> Iterator[_Shape]:
    """What can be cut in a block, an input of its matrices at a time."""
    touched: dict[int, dict[str, Tensor]] = {}
    for name in wiring.weights:
        if (found := wiring.touched(name)) is not None:
            touched.setdefault(found[0], {})[name] = found[1]
    for group, makers in touched.items():
        shape = _shape(makers, wiring.groups()[group])
        if shape is not None:
            yield shape


def _shape(makers: Mapping[str, Tensor], readers: Sequence[str]) -> _Shape | None:
    """The structures between `makers`, with what `Wiring.touched` says of each, and the `readers`."""
    if all(found.dtype != torch.bool and found.unique().numel() == found.numel() for found in makers.values()):
        rows = {name: sources.t() for name, sources in makers.items()}  # a channel is made of rows of its own
        columns = torch.arange(len(next(iter(rows.values()))), device=next(iter(rows.values())).device)
        return _Shape("ffn", (0, 0), rows, tuple(readers), columns[:, None]) if len(columns) > 1 else None
    makers = {name: found if found.dtype == torch.bool else _table(found) for name, found in makers.items()}
    patterns, rows = torch.cat(list(makers.values())).unique(dim=0, return_counts=True)
    # A head's rows of queries touch all that it gives, each of them; one of values touches one channel of every head.
    mixing = patterns[(rows > 1) & (patterns.sum(1) > 1)]
    parts, one = _parts(patterns), False
    if parts.max() == 0 and len(mixing) > 1:
        # One head of keys and values for all query heads: it stays, and these go one by one.
        parts, one = _parts(mixing[~mixing.all(1)]), True
    number = int(parts.max()) + 1
    if number < 2:
        return None
    columns = _members(parts, number)
    rows = {name: _members(_part_of(touched, parts), number) for name, touched in makers.items()}
    rows = {name: found for name, found in rows.items() if found is not None and found.numel()}
    if columns is None or not rows:
        return None
    width = columns.shape[1]
    if width == 1:
        return _Shape("ffn", (0, 0), rows, tuple(readers), columns)
    if not len(mixing):
        return None
    head = int(mixing.sum(1).min())
    kind = "head" if head == width else "kv_group"
    return _Shape(kind, (width // head, 0 if one else 1), rows, tuple(readers), columns)


def _table(sources: Tensor) -> Tensor:
    """Which columns each row touches, (rows, columns) bool, from the rows that touch each, (n, columns).

    Rows behind the last that touches any are left out.
    """
    touched = torch.zeros(int(sources.max()) + 1, sources.shape[1], dtype=torch.bool, device=sources.device)
    return touched.index_put((sources, torch.arange(sources.shape[1], device=sources.device)), touched.new_ones(()))


def _parts(patterns: Tensor) -> Tensor:
    """Parts of columns, (columns,), numbered by their first: columns in one of the `patterns`, (n, columns) bool."""
    label = torch.arange(patterns.shape[1], device=patterns.device)
    for pattern in patterns[patterns.sum(1) > 1]:
        together = torch.isin(label, label[pattern])
        label = torch.where(together, label[together].min(), label)
    return label.unique(return_inverse=True)[1]


def _part_of(touched: Tensor, parts: Tensor) -> Tensor:
    """The part that each row touches, (rows,), of `touched`, (rows, columns) bool; -1 where none or several."""
    numbers = torch.where(touched, parts, -1)
    last = numbers.max(1).values
    first = torch.where(touched, parts, len(parts)).min(1).values
    return torch.where(first == last, last, -1)


def _members(parts: Tensor, number: int) -> Tensor | None:
    """The members of each of `number` parts, (number, size), in order; `None` where they differ in size."""
    sizes = torch.bincount(parts[parts >= 0], minlength=number)
    if (sizes != sizes[0]).any():
        return None
    order = torch.argsort(parts, stable=True)
    return order[len(parts) - int(sizes.sum()) :].reshape(number, -1)


def _why(weight: Weight) -> str:
    return "an expert" if weight.expert is not None else "its rows and columns belong to no channel or head alone"
