"""The structures of a model: what can be cut out of it so that smaller matrices are left, found by wiring.

A structure is a channel of an MLP, a head, or a group of query heads with the head of keys and values that they share.
It owns rows of the matrices that make it, and columns of those that read it. With these columns zero it is silenced:
the model in which it is cut out gives the same. An expert is one as well, silenced by a router that never chooses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...model.architecture import Architecture, Weight
from ...model.walk import WalkedBlock, walk_blocks
from ...model.wiring import Wiring
from .slicing import trouble
from .structure import Cut, Found, Structures
from .wholes.experts import expert_structures


def find_structures(model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]) -> Found:
    """Every structure of a model, by unit.

    Args:
        batch (`Mapping[str, Tensor]`): inputs of the model by name, one short sample: (1, length, ...). What reaches
            what is seen from it, and 16 tokens are enough.
    """
    structures: dict[str, Structures] = {}
    left: dict[str, str] = dict(architecture.dense)
    known: dict[tuple, tuple[list[_Shape], dict[str, str]]] = {}
    tried: dict[tuple, str | None] = {}
    for walked in walk_blocks(model, architecture, [batch], sequential=False):
        if walked.run is None:
            left |= {weight.name: "outside the blocks" for weight in walked.weights}
            continue
        wiring, name = Wiring(walked), walked.name
        alike = tuple((weight.name.removeprefix(name), weight.shape) for weight in walked.weights)
        # Blocks of one make are wired alike: what was found in one is tried in the next, which costs a run each.
        shapes, troubles = known.get(alike, ([], {}))
        if not shapes or not all(shape.of(name).holds(wiring) for shape in shapes):
            shapes, troubles = known[alike] = _looked_at(walked, wiring)
        every = [shape.of(name).structures(walked, wiring.weights) for shape in shapes]
        left |= {name + relative: why for relative, why in troubles.items()}
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
                found = replace(found, unit=f"{found.unit}.{sum(unit.startswith(found.unit) for unit in structures)}")
            structures[found.unit] = found
    return Found(structures, left)


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
    """

    kind: str
    heads: tuple[int, int]
    makers: Mapping[str, Tensor]
    readers: tuple[str, ...]
    columns: Tensor

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
        return Structures(f"{walked.name}:{self.kind}", self.kind, tuple(makes), tuple(reads), self.heads)

    def _by_head(self, walked: WalkedBlock, owners: set[str]) -> Iterator[Cut]:
        """Vectors with a number for each query head, such as sinks of attention, that these modules own."""
        number, queries = len(self.columns), self.heads[0]
        for owner in sorted(owners) if queries else ():
            for name, value in walked.model.get_submodule(owner).named_parameters(recurse=False):
                if value.shape == (number * queries,):
                    size = self.columns.shape[1] // queries
                    yield Cut(f"{owner}.{name}", 0, self.columns[:, ::size] // size)


def _looked_at(walked: WalkedBlock, wiring: Wiring) -> tuple[list[_Shape], dict[str, str]]:
    """What can be cut in a block, and the weights of which nothing can -> why; by names relative to the block's."""
    shapes, why = [], {weight.name: _why(weight) for weight in walked.weights}
    for shape in _shapes(wiring):
        names = (*shape.makers, *shape.readers)
        if (found := trouble(walked, shape.structures(walked, wiring.weights))) is not None:
            why |= dict.fromkeys(names, _counted_outside(walked, shape) or found)
            continue
        shapes.append(shape.of("", walked.name))
        for name in names:
            why.pop(name, None)
    return shapes, {name.removeprefix(walked.name): reason for name, reason in why.items()}


def _counted_outside(walked: WalkedBlock, shape: _Shape) -> str | None:
    """Why no head can go from one block alone, where the blocks share a tensor with a row for each; else `None`."""
    number = len(shape.columns) * shape.heads[0]
    # What a block was given stands behind what it gives.
    if number and any(tensor.dim() > 2 and number in tensor.shape[:2] for tensor in walked.run()[1:]):
        return (
            f"cannot be cut: blocks share a tensor with a row for each of {number} heads (slopes, biases of "
            "positions), which would go to other heads than those that stay"
        )
    return None


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
    """The structures between `makers`, with what each row touches, (rows, columns) bool, and the `readers`."""
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
