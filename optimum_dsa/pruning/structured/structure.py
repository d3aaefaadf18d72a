"""What a structure is: the rows and columns that go together."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn


# What a structure is -> how it is called. A group of query heads has one head of keys and values.
KINDS = {"ffn": "channel of an MLP", "head": "attention head", "kv_group": "key-value group with its query heads"}


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
class Structures:
    """All structures of one kind in one block.

    Attributes:
        unit (`str`): what an allocation calls them, such as `"model.layers.3:ffn"`.
        kind (`str`): of `KINDS`.
        makes (`tuple[Cut, ...]`): rows of matrices, and entries of their biases.
        reads (`tuple[Cut, ...]`): columns of the matrices through which what they give leaves.
        heads (`tuple[int, int]`): query heads, and heads of keys and values, of one structure; (0, 0) of a channel.
    """

    unit: str
    kind: str
    makes: tuple[Cut, ...]
    reads: tuple[Cut, ...]
    heads: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.reads[0].index)

    @property
    def block(self) -> str:
        return self.unit.partition(":")[0]

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.reads[0].index.shape[1] // max(self.heads[0], 1)

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

    def cost(self, model: nn.Module) -> int:
        """Parameters of one structure; all of a kind in a block have as many."""
        return sum(
            prod(size for axis, size in enumerate(shape) if axis != cut.axis) * cut.index.shape[1]
            for cut in self.cuts
            if (shape := model.get_parameter(cut.tensor).shape)
        )
