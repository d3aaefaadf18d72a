"""Metrics that are written down: expression trees over a weight, the norms of its inputs and its gradients, as data.

`mul(abs(W), X)` is Wanda's metric, `mul(square(W), minmax(abs(G)))` that of Pruner-Zero. A text is read by a grammar
of names, brackets and commas, and looked up in tables: nothing of it is ever run as code.

Operations are the published ones, of the shape of what they are given; an X stays (1, in_features) until it meets a W.

Dong et al., Pruner-Zero, ICML 2024, https://arxiv.org/abs/2406.02924; https://github.com/pprp/Pruner-Zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...common.files import parse_json
from ...common.registry import Registry, UnknownNameError, near
from ...common.values import short


if TYPE_CHECKING:
    from ...model.statistics import LayerStatistics

PRUNER_ZERO = "https://arxiv.org/abs/2406.02924"
DEEPEST, LARGEST = 8, 63  # levels and nodes of a tree: the published metric has 4 and 6
LONGEST = 4000  # characters of a text; checked before it is read
_WORDS = re.compile(r"\s*([A-Za-z_]\w*|[(),])")
_FLOOR = 1e-3  # what the published logarithm adds

# name -> (weight, statistics) -> (out_features, in_features) or (1, in_features) float32. The fact `reads` is that of
# a metric.
LEAVES = Registry("leaf of a metric")
# name -> what it does to one or two tensors, float32; it returns a new one. The fact `arity` says how many it takes.
OPERATIONS = Registry("operation of a metric")


@LEAVES.register("W", reads="nothing")
def _weight(weight: Tensor, statistics: LayerStatistics | None) -> Tensor:
    """W itself, (out_features, in_features)."""
    return weight.float()


@LEAVES.register("X", reads="inputs")
def _input_norm(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """‖x_j‖, (1, in_features): Wanda's scaler. Its square is the diagonal of X·Xᵀ over the number of sequences."""
    return statistics.input_norm[None]


@LEAVES.register("G", reads="gradients")
def _gradient(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """‖G_ij‖₂ over samples, (out_features, in_features): of the dense model's loss, and so never negative."""
    return statistics.gradient


def _unary(name: str) -> Callable:
    return OPERATIONS.register(name, reference=PRUNER_ZERO, arity=1)


def _binary(name: str) -> Callable:
    return OPERATIONS.register(name, reference=PRUNER_ZERO, arity=2)


for _name, _operation in {"abs": torch.abs, "neg": torch.neg, "square": torch.square, "tanh": torch.tanh}.items():
    _unary(_name)(_operation)
for _name, _operation in {"add": torch.add, "sub": torch.sub, "mul": torch.mul}.items():
    _binary(_name)(_operation)


@_unary("sqrt")
def _sqrt(x: Tensor) -> Tensor:
    """√|x|, of any shape."""
    return x.abs().sqrt_()


@_unary("log")
def _log(x: Tensor) -> Tensor:
    """ln(|x| + 0.001), of any shape."""
    return x.abs().add_(_FLOOR).log_()


@_unary("exp")
def _exp(x: Tensor) -> Tensor:
    """eˣ, of any shape; of x up to 80: float32 ends at e^88, where the published bound of 100 is infinite."""
    return x.clamp(max=80).exp_()


@_unary("minmax")
def _minmax(x: Tensor) -> Tensor:
    """(x − min) / (max − min) over all of x, of any shape: in [0, 1]; 1 where all are equal, as in `pruner_zero`."""
    low, high = x.aminmax()
    return (x - low).div_(high - low) if high > low else torch.ones_like(x)


@_unary("zscore")
def _zscore(x: Tensor) -> Tensor:
    """(x − mean) / standard deviation over all of x, of any shape; 0 where all are equal."""
    return (x - x.mean()).div_(x.std(correction=min(1, x.numel() - 1)))


@_binary("div")
def _div(x: Tensor, y: Tensor) -> Tensor:
    """x / ‖y‖, as the published code divides: by one number. Element by element is "ratio"."""
    return x / y.norm()


@OPERATIONS.register("ratio", arity=2)
def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, element by element; 0 where y is."""
    return (x / y).masked_fill_(y == 0, 0)


# Those that "Relative importance" and OptiShear are written with.
@OPERATIONS.register("sigmoid", reference="https://arxiv.org/abs/2502.10735", arity=1)
def _sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e⁻ˣ), of any shape."""
    return x.sigmoid()


@OPERATIONS.register("softmax", reference="https://arxiv.org/abs/2502.10735", arity=1)
def _softmax(x: Tensor) -> Tensor:
    """eˣ over its sum in the row, (rows, columns)."""
    return x.softmax(dim=1)


@OPERATIONS.register("row_sum", reference="https://arxiv.org/abs/2502.10735", arity=1)
def _row_sum(x: Tensor) -> Tensor:
    """(rows, columns) -> (rows, 1)."""
    return x.sum(dim=1, keepdim=True)


@OPERATIONS.register("column_sum", reference="https://arxiv.org/abs/2502.10735", arity=1)
def _column_sum(x: Tensor) -> Tensor:
    """(rows, columns) -> (1, columns)."""
    return x.sum(dim=0, keepdim=True)


# Names of the published trees, https://github.com/pprp/Pruner-Zero, for the same operations.
PUBLISHED = {"sqr": "square", "pow": "square", "mms": "minmax", "zsn": "zscore"}


@dataclass(frozen=True)
class Expression:
    """A metric as a tree; called as any metric: (weight, statistics) -> scores.

    Attributes:
        name (`str`): a row of `LEAVES` or of `OPERATIONS`.
        parts (`tuple[Expression, ...]`): what the operation is of; empty of a leaf.
    """

    name: str
    parts: tuple[Expression, ...] = ()

    def __post_init__(self):
        if self.name not in OPERATIONS and self.name not in LEAVES:
            known = [*OPERATIONS, *LEAVES]
            raise UnknownNameError(
                f"A metric has no {short(self.name)}.{near(self.name, known)} Known: {', '.join(sorted(known))}."
            )
        arity = OPERATIONS.fact(self.name, "arity") if self.name in OPERATIONS else 0
        if len(self.parts) != arity:
            raise ValueError(f"{self.name} is of {arity} expressions, got {len(self.parts)}.")

    @classmethod
    @lru_cache(maxsize=4096)
    def parse(cls, text: str) -> Expression:
        """The expression in a text such as "mul(square(W), minmax(abs(G)))", or in the published JSON of a tree.

        Raises:
            ValueError: it is none, is deeper than 8 levels or has more than 63 nodes, or no operation is at its root.
            UnknownNameError: a name that neither table holds.
        """
        if len(text) > LONGEST:
            raise ValueError(f"A metric is written in {LONGEST} characters at most, got {len(text):,}.")
        if text.lstrip().startswith("{"):
            try:
                found = _of_tree(parse_json(text, unique=True), 1)
            except ValueError as error:
                raise ValueError(f"Cannot read the metric {short(text)}: {error}") from None
        else:
            words = _words(text)
            found = _of_words(words, text, 1)
            if (more := next(words)) is not None:
                raise _unreadable(text, f"{more!r} follows where it ends")
        if found.name in LEAVES:
            raise _unreadable(text, "a metric is an operation on W, X or G, such as abs(W)")
        if (size := sum(1 for _ in found.nodes())) > LARGEST:
            raise ValueError(f"A metric has {LARGEST} operations and leaves at most, got {size}; simplify it.")
        return found

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parts))})" if self.parts else self.name

    def nodes(self) -> Iterator[Expression]:
        """All expressions in it, itself first, from left to right."""
        yield self
        for part in self.parts:
            yield from part.nodes()

    @property
    def depth(self) -> int:
        """Levels of the tree: 1 of a leaf."""
        return 1 + max((part.depth for part in self.parts), default=0)

    @property
    def leaves(self) -> frozenset[str]:
        """The rows of `LEAVES` that it is of."""
        return frozenset(node.name for node in self.nodes() if not node.parts)

    @property
    def reads(self) -> str:
        """What it needs of calibration, as the fact of a row of `METRICS` says it."""
        return reads_of_leaves(self.leaves)

    @torch.no_grad()
    def __call__(self, weight: Tensor, statistics: LayerStatistics | None = None) -> Tensor:
        """Scores, (out_features, in_features) float32, finite, non-negative; nothing given is changed.

        What is NaN at any step, as 0 / 0, is 0 there, and infinities are the largest float32. Where the lowest score
        would be negative, it is taken from all of them, which leaves their order.
        """
        found = self._value(weight, statistics).expand(weight.shape).contiguous()
        if (low := found.min()) < 0:
            found.sub_(low).nan_to_num_()
        return found

    def _value(self, weight: Tensor, statistics: LayerStatistics | None) -> Tensor:
        """The value of the tree, (out_features or 1, in_features or 1) float32."""
        if not self.parts:
            return LEAVES[self.name](weight, statistics)
        # Finite at every step: what an operation behind it makes of a NaN, a comparison could not undo.
        return OPERATIONS[self.name](*(part._value(weight, statistics) for part in self.parts)).nan_to_num_(nan=0.0)


class MetricTable(Registry):
    """A `Registry` of metrics in which every expression stands as well, under its own text."""

    def __missing__(self, name):
        if _is_expression(name):
            return Expression.parse(name)
        try:
            return super().__missing__(name)
        except UnknownNameError as error:
            raise UnknownNameError(f"{error} An expression has operations, such as 'mul(abs(W), X)'.") from None

    def fact(self, name: str, fact: str, default: Any = None) -> Any:
        """What was said of the metric `name` when it was registered; of an expression, what it reads."""
        if name in self or not _is_expression(name):
            return super().fact(name, fact, default)
        return {"reads": Expression.parse(name).reads}.get(fact, default)


def reads_of_leaves(leaves: Iterable[str]) -> str:
    """What these rows of `LEAVES` need of calibration together: each of the words stands for those before it too."""
    order = ("nothing", "inputs", "gradients")
    return max((LEAVES.fact(name, "reads", "inputs") for name in leaves), key=order.index)


def _is_expression(name: Any) -> bool:
    return isinstance(name, str) and any(bracket in name for bracket in "({")


def _unreadable(text: str, why: str) -> ValueError:
    return ValueError(
        f"Cannot read the metric {short(text)}: {why}; expected operations on W, X and G as in "
        "'mul(square(W), minmax(abs(G)))'."
    )


def _words(text: str) -> Iterator[str | None]:
    """Names, brackets and commas of a text, in order; `None` for ever behind its end."""
    place, text = 0, text.rstrip()
    while place < len(text):
        if (found := _WORDS.match(text, place)) is None:
            raise _unreadable(text, f"{text[place : place + 10].strip()!r} is no name, bracket or comma")
        yield found[1]
        place = found.end()
    while True:
        yield None


def _of_words(words: Iterator[str | None], text: str, depth: int) -> Expression:
    """The expression with which `words` go on, at this level of the tree; what comes behind it is left there."""
    name = next(words)
    if name is None or name in "(),":
        raise _unreadable(text, "it ends too soon" if name is None else f"{name!r} stands where a name is expected")
    return _built(name, text, depth, lambda number: _brackets(words, text, depth, number))


def _brackets(words: Iterator[str | None], text: str, depth: int, number: int) -> Iterator[Expression]:
    """The `number` expressions in the brackets with which `words` go on."""
    for expected in "(" + "," * (number - 1):
        if next(words) != expected:
            raise _unreadable(text, f"{expected!r} is missing")
        yield _of_words(words, text, depth + 1)
    if next(words) != ")":
        raise _unreadable(text, "')' is missing")


def _built(name: str, text: str, depth: int, parts: Callable[[int], Iterator[Expression]]) -> Expression:
    """The expression of a name, ours or a published one, and of as many `parts` as that takes."""
    if depth > DEEPEST:
        raise ValueError(f"A metric has {DEEPEST} levels at most, and {short(text)} has more; simplify it.")
    name = PUBLISHED.get(name, name)
    if name == "skp":  # the published operation that does nothing
        return next(iter([*parts(1)]))
    return Expression(name, tuple(parts(OPERATIONS.fact(name, "arity"))) if name in OPERATIONS else ())


def _of_tree(tree: Any, depth: int) -> Expression:
    """The expression in the published form, {"data": name, "left": tree, "right": tree}, at this level."""
    if not isinstance(tree, Mapping) or not isinstance(tree.get("data"), str):
        raise ValueError(f"a tree is {{'data': name, 'left': tree, 'right': tree}}, got {short(tree)}.")
    places = [place for place in ("left", "right") if place in tree]
    if odd := sorted(tree.keys() - {"data", *places}):
        raise ValueError(f"a tree has no {short(odd[0])}.")

    def parts(number: int) -> Iterator[Expression]:
        if places != ["left", "right"][:number]:
            raise ValueError(f"{tree['data']} is of {number} trees, got {places}.")
        return (_of_tree(tree[place], depth + 1) for place in places)

    if places and tree["data"] in LEAVES:
        raise ValueError(f"{tree['data']} is a leaf, and has {places[0]}.")
    return _built(tree["data"], str(tree), depth, parts)
