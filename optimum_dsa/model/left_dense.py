"""What of the blocks stays dense, in words: by kind of matrix, with its share."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from .parameters import one_name_each


LARGE = 0.05  # a share that nobody should have to look for: it is said before the work
_NAMED = 4  # kinds that are named, the largest; the rest is a number


def kind_of(name: str) -> str:
    """A name, `layers.3.mlp.experts[7]`, with what counts blocks and experts left open: `layers.*.mlp.experts[*]`."""
    return re.sub(r"(?<=\.)\d+(?=\.)|(?<=\[)\d+(?=\])", "*", name)


def sizes_of(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Name of a matrix, or of one of experts, `name[3]` -> its weights; shared ones are counted once."""
    found, counted, one_name = {}, set(), one_name_each(model)
    for name in names:
        whole, _, expert = name.partition("[")
        parameter = model.get_parameter(whole)
        place = one_name.get(whole, whole), expert
        found[name] = 0 if place in counted else parameter.numel() // (parameter.shape[0] if expert else 1)
        counted.add(place)
    return found


def share_of(sizes: Mapping[str, int], prunable: int) -> float:
    """The share of matrices of these `sizes` beside `prunable` weights."""
    left = sum(sizes.values())
    return left / max(left + prunable, 1)


def told(sizes: Mapping[str, int], prunable: int) -> str:
    """Such as "12.3% of the blocks' weights: layers.*.mlp.experts.w1 12.0%, layers.*.router 0.3%", largest first."""
    alike = Counter(map(kind_of, sizes))
    kinds: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        # Of a kind that is there once, its own name: with "*" it would seem to be of all blocks.
        kinds[kind_of(name) if alike[kind_of(name)] > 1 else name] += size
    order = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    total = max(sum(sizes.values()) + prunable, 1)
    named = [f"{kind} {kinds[kind] / total:.1%}" for kind in order[:_NAMED]]
    rest = sum(kinds[kind] for kind in order[_NAMED:])
    if rest:
        named.append(f"{len(order) - _NAMED} more {rest / total:.1%}")
    return f"{share_of(sizes, prunable):.1%} of the blocks' weights: {', '.join(named)}"


def excluding(names: Collection[str]) -> list[str]:
    """What to give as `exclude` so that the matrices of these names, and those like them, stay dense."""
    # fnmatch reads brackets as a set of characters, and experts of one parameter are excluded together.
    return sorted({kind_of(name).partition("[")[0] for name in names})
