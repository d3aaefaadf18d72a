"""Where units sit in a model, read from their names: which block, and which kind of matrix in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .budget import Allocation


WHOLE = "all matrices"
_BLOCK = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<index>\d+)(?:[.:](?P<rest>.+))?")


@dataclass(frozen=True)
class Place:
    """What a unit's name says.

    Attributes:
        stack: the list that holds the block, such as "model.layers"; the name itself for a matrix outside the blocks.
        index: the block's number in the stack; `None` outside the blocks.
        kind: the matrix's path inside the block, experts written as one; `WHOLE` for a unit that is a block; the name
            itself for a matrix outside the blocks.
    """

    stack: str
    index: int | None
    kind: str

    @property
    def block(self) -> str:
        """The block's name; the matrix's own outside the blocks."""
        return self.stack if self.index is None else f"{self.stack}.{self.index}".lstrip(".")


def place(unit: str) -> Place:
    """Where `unit` sits: "model.layers.3.mlp.up_proj.weight" is kind "mlp.up_proj" of block 3 of "model.layers"."""
    name = re.sub(r"\[\d+\]$", "", unit).removesuffix(".weight")
    found = _BLOCK.fullmatch(name)
    if not found:
        return Place(name, None, name)
    # Numbers inside a block are those of experts, which have one kind.
    kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", found["rest"] or WHOLE)
    return Place(found["stack"] or "", int(found["index"]), kind)


def by_block(allocation: Allocation) -> dict[str, float]:
    """Block -> share of its prunable weights removed, in the order of the allocation."""
    return {block: share for (block, _), share in _shares(allocation, lambda at: (at.block, "")).items()}


def grid(allocation: Allocation) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Blocks, kinds of matrix, and (block, kind) -> share removed; a pair that the model lacks is left out."""
    shares = _shares(allocation, lambda at: (at.block, at.kind))
    blocks, kinds = (list(dict.fromkeys(pair[side] for pair in shares)) for side in (0, 1))
    return blocks, kinds, shares


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Path -> its shortest ending that no other path has: "self_attn.q_proj" -> "q_proj"."""
    split = {path: path.split(".") for path in paths}

    def ending(path: str) -> str:
        parts = split[path]
        for length in range(1, len(parts)):
            alike = [other for other in split if split[other][-length:] == parts[-length:]]
            if alike == [path]:
                return ".".join(parts[-length:])
        return path

    return {path: ending(path) for path in split}


def _shares(allocation: Allocation, group) -> dict[tuple[str, str], float]:
    """Mean sparsity of every group of units, weighted by size; plainly where no sizes are known."""
    sums: dict[tuple[str, str], list[float]] = {}
    known = any(allocation.sizes.values())
    for unit, share in allocation.sparsity.items():
        size = allocation.sizes[unit] if known else 1
        entry = sums.setdefault(group(place(unit)), [0.0, 0.0])
        entry[0] += share * size
        entry[1] += size
    return {key: total / size if size else 0.0 for key, (total, size) in sums.items()}
