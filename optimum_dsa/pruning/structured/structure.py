"""What a structure is: the rows and columns that go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


# What a structure is -> how it is called. A group of query heads has one head of keys and values.
KINDS = {
    "ffn": "channel of an MLP",
    "head": "attention head",
    "kv_group": "key-value group with its query heads",
    "expert": "expert, with its row of the router",
    "block": "whole block",
    "attention": "attention of a block, with all its heads",
    "mlp": "MLP of a block, with all its channels",
}
# Kinds that go before the blocks are walked: nothing that stays can be fitted to what they gave.
WHOLE = ("expert", "block")
# What goes from a block with all that it is made of, or not at all -> what that is.
ENTIRE = {"attention": ("head", "kv_group"), "mlp": ("ffn",)}


@dataclass(frozen=True)
class Cut:
    """Where structures lie in a tensor: number j owns `index[j]`, (size,), along `axis` of the tensor as it is stored.

    Attributes:
        tensor (`str`): full name of the parameter.
        index (`Tensor`): (structures, size) int64.
    """

    tensor: str
    axis: int
    index: Tensor


@dataclass(frozen=True)
class Place:
    """Where the structures of a unit can be counted: each is `size` wide along `axis` of a tensor, as it is stored.

    Attributes:
        matrix (`str`): full name of the parameter or buffer, or of a list of modules, of which each is one.
        others (`int`): what of that axis belongs to no structure.
    """

    matrix: str
    axis: int = 0
    size: int = 1
    others: int = 0

    def count(self, model: nn.Module) -> float:
        """How many there are in a model now; no whole number where it is another model."""
        found = tensor_named(model, self.matrix)
        return ((found.shape[self.axis] if isinstance(found, Tensor) else len(found)) - self.others) / self.size


@dataclass(frozen=True)
class Structures:
    """All structures of one kind in one block.

    Attributes:
        unit (`str`): what an allocation calls them, such as `"model.layers.3:ffn"`.
        kind (`str`): of `KINDS`.
        makes (`tuple[Cut, ...]`): rows of matrices, and entries of their biases.
        reads (`tuple[Cut, ...]`): columns of the matrices through which what they give leaves.
        heads (`tuple[int, int]`): query heads, and heads of keys and values, of one structure; (0, 0) of a channel.
        wholes (`tuple[str, ...]`): modules that are a structure each, beside what it owns of others; empty where
            structures are parts of matrices.
        least (`int`): how many have to stay.
        fixed (`tuple[int, ...]`): numbers of those that have to stay themselves.
        around (`tuple[str, ...]`): modules that count them.
        slopes (`int`): heads of which the block is given a row each (ALiBi), and keeps those of its own; else 0.
        entire (`bool`): whether they go from the block together, or not at all.
        absent (`tuple[str, str, int]`, *optional*): what cannot run without any of them and is left out of the block
            then: see `modeling_per_layer.leave_out`.
        tied (`str`): the same of units that lose the same numbers, as their blocks share a tensor of them; else empty.
    """

    unit: str
    kind: str
    makes: tuple[Cut, ...]
    reads: tuple[Cut, ...]
    heads: tuple[int, int] = (0, 0)
    wholes: tuple[str, ...] = ()
    least: int = 1
    around: tuple[str, ...] = ()
    fixed: tuple[int, ...] = ()
    tied: str = ""
    slopes: int = 0
    entire: bool = False
    absent: tuple[str, str, int] | None = None

    def __len__(self) -> int:
        return len(self.cuts[-1].index) if self.cuts else len(self.wholes)

    @property
    def goes_as(self) -> str:
        """The row of `KINDS` by which it is asked for."""
        return next(name for name, kinds in ENTIRE.items() if self.kind in kinds) if self.entire else self.kind

    @property
    def block(self) -> str:
        return self.unit.partition(":")[0]

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.reads[0].index.shape[1] // max(self.heads[0], 1)

    def query_heads(self, numbers: Tensor) -> Tensor:
        """The numbers of the query heads of structures, (n,) int64 -> (n · heads of one,)."""
        return (self.reads[0].index[numbers, :: self.head_size] // self.head_size).flatten()

    @property
    def relative(self) -> list[str]:
        """The tensors that are cut, by their names in the block."""
        return [self.within(cut.tensor) for cut in self.cuts]

    def within(self, tensor: str) -> str:
        """A tensor's name in the block."""
        return tensor.removeprefix(f"{self.block}.")

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return self.makes + self.reads

    def place(self, model: nn.Module) -> Place:
        """Where they can be counted, now and when some are cut out."""
        if not self.cuts:
            return Place(self.wholes[0].rpartition(".")[0])
        cut = (self.reads or self.makes)[0]
        whole = tensor_named(model, cut.tensor).shape[cut.axis]
        return Place(cut.tensor, cut.axis, cut.index.shape[1], whole - cut.index.numel())

    def cost(self, model: nn.Module) -> int:
        """Parameters of one structure; all of a kind in a block have as many, and of blocks it is the largest."""
        parts = sum(
            prod(size for axis, size in enumerate(tensor.shape) if axis != cut.axis) * cut.index.shape[1]
            for cut in self.cuts
            if isinstance(tensor := tensor_named(model, cut.tensor), nn.Parameter)
        )
        wholes = (model.get_submodule(name).parameters() for name in self.wholes)
        return parts + max((sum(parameter.numel() for parameter in whole) for whole in wholes), default=0)


@dataclass(frozen=True)
class Found:
    """What there is to cut.

    Attributes:
        structures (`Mapping[str, Structures]`): by unit, first block first.
        left (`Mapping[str, str]`): weights that no structure owns a part of -> why.
    """

    structures: Mapping[str, Structures]
    left: Mapping[str, str]


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this full name."""
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)
