"""Watching what each weight of a block multiplies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..common.fences import one_expert_at_a_time, tensor_version
from .architecture import Block, UnprunableError, Weight
from .left_dense import kind_of
from .statistics import LayerStatistics


_PRODUCTS = {nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
# Of several matrices at once, each with inputs of its own.
_BATCHED = (_PRODUCTS - {nn.functional.linear, torch.mm, Tensor.mm}) | {torch.bmm, Tensor.bmm}


class AllSeen(Exception):
    """Raised in a block whose watched weights have all been given their input: the rest of it need not run."""


class Awaited:
    """What a run of a block is watched for; raises [`AllSeen`] when all of it has been seen.

    Args:
        names (`Iterable[str]`): weights, each of which is given one input.
        added (`Collection[str]`): those of which it has to be seen, too, what their outputs are added to.
    """

    def __init__(self, names: Iterable[str], added: Collection[str] = ()):
        self._left, self._added = set(names), added

    def given(self, name: str) -> None:
        """The weight was given its input."""
        if name not in self._added:
            self.done(name)

    def done(self, name: str) -> None:
        """Nothing more is to be seen of the weight."""
        self._left.discard(name)
        if not self._left:
            raise AllSeen


class Observes(Protocol):
    """Is told what the weights of a block multiply."""

    def observe(self, weight: Weight, inputs: Tensor) -> None: ...


class Unheard:
    """Is told, and keeps nothing: for a block that has to be run as it is when it is observed."""

    def observe(self, weight: Weight, inputs: Tensor) -> None: ...


class Observer:
    """Collects the `LayerStatistics` of a block's weights over batches.

    Maps that are given the very same tensors (query, key and value) share one `LayerStatistics`. Who shares with whom
    is learnt from the first batch, and checked on every input.
    """

    def __init__(self, gram: bool, mean: bool = False):
        self.gram, self.mean = gram, mean
        self.statistics: dict[str, LayerStatistics] = {}
        self.sequences = 0
        self._source: dict[str, str] = {}  # weight -> the weight whose statistics it shares
        # of this batch: inputs -> the first weight that they were given to (the tensors are held alive)
        self._inputs: dict[tuple[int, int], tuple[str, Tensor]] = {}
        self._given: dict[str, list[tuple[int, int]]] = {}  # of this batch: weight -> its inputs, in order
        self._first = True
        self._real: Tensor | None = None
        self._dense: Mapping[str, Sequence[Tensor]] = {}
        self._tokens = 0

    def over(self, batches: Sequence[int], run: Callable[[int], None]) -> None:
        """Have `run` watch every batch, by its number."""
        for number in batches:
            run(number)

    def start_batch(
        self,
        samples: int,
        real: Tensor | None = None,
        dense: Mapping[str, Sequence[Tensor]] | None = None,
        tokens: int = 0,
    ) -> None:
        """Begin a batch of `samples` sequences; of whose tokens only those are counted that `real` marks.

        Args:
            real (`Tensor`, *optional*): (samples, length) bool; by default all tokens are.
            dense (`Mapping[str, Sequence[Tensor]]`, *optional*): by weight, what it multiplies in the dense model in
                this batch, in order, (..., in_features).
            tokens (`int`): the tokens of the batch, all of which have to reach a weight before inputs are paired.
        """
        self._end_batch()
        self._real, self._dense, self._tokens = real, dense or {}, tokens
        self._first = self.sequences == 0
        self.sequences += samples

    def observe(self, weight: Weight, inputs: Tensor) -> None:
        """Note that `weight` multiplies `inputs`, (..., in_features)."""
        if self._is_a_table(weight.name, inputs):
            return
        # The version too: a tensor that was changed in place is another input under the same id.
        name, key = weight.name, (id(inputs), tensor_version(inputs))
        source = self._source_of(name, key, inputs)
        self._given[name].append(key)
        if source != name:
            self.statistics[name] = self.statistics[source]
            return
        if name not in self.statistics:
            self.statistics[name] = self._statistics(weight, inputs.device)
        self.statistics[name].update_(self._counted(name, inputs))
        dense = self._dense_of(name, inputs)
        if dense is not None:
            self.statistics[name].pair_(self._counted(name, inputs), self._counted(name, dense))

    def _is_a_table(self, name: str, inputs: Tensor) -> bool:
        """Whether `inputs` are the same for all sequences, as relative positions that the keys' matrix reads as well.

        They come once in a batch, however many sequences that has: counted, the batch size would change the result.
        """
        given = self._given.get(name)
        if not given or inputs.dim() != 3 or len(inputs) != 1:
            return False
        return inputs.shape[:-1] != self._inputs[given[0]][1].shape[:-1]

    def add_residual(self, before: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
        """Note what the residual stream lacks in the batch that was run last.

        Args:
            before: by weight, the stream that its outputs are added to, (samples, ..., out_features).
            dense: the same in the dense model.
        """
        sources = list(self._source.values())
        for name, stream in before.items():
            # One sum cannot serve two matrices that share an input: what they lack differs.
            given = self._given.get(name, ())
            if name not in dense or len(given) != 1 or sources.count(self._source[name]) != 1:
                continue
            missing = dense[name].to(stream.device).float() - stream.float()
            inputs = self._inputs[given[0]][1]
            self.statistics[name].lack_(self._counted(name, inputs), self._counted(name, missing))

    def _dense_of(self, name: str, inputs: Tensor, number: int = -1) -> Tensor | None:
        """What the dense model gives in the place of `inputs`, (..., in_features); `None` where that is not known."""
        dense, number = self._dense.get(name, ()), len(self._given[name]) - 1 if number < 0 else number
        if number >= len(dense) or dense[number].shape != inputs.shape:
            return None
        # As many tokens of a routed expert need not be the same ones; where all tokens come, they come in order.
        whole = inputs.dim() > 2 or len(inputs) == self._tokens
        return dense[number].to(inputs.device) if whole else None

    def _source_of(self, name: str, key: tuple[int, int], inputs: Tensor) -> str:
        """The weight whose statistics hold what `name` is given now, in the input `key`: its own, or another's.

        `inputs` is (..., in_features).

        Raises:
            UnprunableError: the two were given the same inputs in earlier batches, and only some of them in this one.
        """
        first, _ = self._inputs.setdefault(key, (name, inputs))
        given = self._given.setdefault(name, [])
        if name not in self._source:
            # Sharing begins in the first batch or never, and only with a weight that has had no input but this one:
            # of what it was given before, `name` would have seen nothing.
            begins = self._first and self._given[first] in ([], [key])
            self._source[name] = first if begins else name
        source = self._source[name]
        theirs = self._given.get(source, [])
        if source == name or theirs[len(given) : len(given) + 1] == [key]:
            return source
        if theirs != given:
            self._part(name, source)
            return name
        # The same inputs until now: what was counted for both is where its own count begins.
        self.statistics[name] = copy.deepcopy(self.statistics[source])
        self._source[name] = name
        return name

    def given_once(self) -> set[str]:
        """The weights that were given one input in the batch that was run last."""
        return {name for name, given in self._given.items() if len(given) == 1}

    def finish(self, block: Block) -> dict[str, LayerStatistics]:
        """The statistics of every weight of the block, also of those that saw no input."""
        self._end_batch()
        for weight in block.weights:
            if weight.name not in self.statistics:
                # An expert that no token reached has no input to tell the device by.
                device = next(iter(self.statistics.values())).device if self.statistics else "cpu"
                self.statistics[weight.name] = self._statistics(weight, device)
            self.statistics[weight.name].sequences = self.sequences
        _lend(block, self.statistics)
        return self.statistics

    def _statistics(self, weight: Weight, device: torch.device | str) -> LayerStatistics:
        return LayerStatistics(weight.shape[1], device, self.gram, with_sum=self.mean)

    def _counted(self, name: str, inputs: Tensor) -> Tensor:
        """The inputs of real tokens, (tokens, in_features); all of them where none is padding."""
        real = self._real
        if real is None:
            return inputs
        real = real.to(inputs.device)
        if inputs.shape[:2] == real.shape:
            return inputs[real]
        # Some blocks flatten samples and positions into one dimension, in the same order.
        if inputs.dim() == 2 and len(inputs) == real.numel():
            return inputs[real.flatten()]
        raise UnprunableError(
            f"{name}: the attention_mask has holes between tokens, and in what reaches this weight they cannot be "
            "told from the tokens; give sequences that are padded at their ends only."
        )

    def _end_batch(self) -> None:
        for name, source in [*self._source.items()]:
            if len(self._given.get(name, ())) != len(self._given.get(source, ())):
                self._part(name, source)
        # Held until here: an id is free for another tensor as soon as its own is gone.
        self._inputs.clear()
        self._given.clear()

    def _part(self, name: str, source: str) -> None:
        """Give `name` statistics of its own, of what it was given in the first batch, which is held.

        Raises:
            UnprunableError: it is a later batch, whose beginning was counted with `source`; or an input is gone.
        """
        inputs = [self._inputs[key][1] for key in self._given.get(name, ())]
        kept = all(tensor_version(each) == key[1] for each, key in zip(inputs, self._given.get(name, ())))
        if not self._first or not kept:
            raise UnprunableError(
                f"{name} and {source} are given the same input at first and different ones later; "
                f"leave one of them dense with exclude=['{name}']."
            )
        self._source[name] = name
        shared = self.statistics[source]
        own = self.statistics[name] = shared.empty()
        for number, each in enumerate(inputs):
            own.update_(self._counted(name, each))
            dense = self._dense_of(name, each, number)
            if dense is not None:
                own.pair_(self._counted(name, each), self._counted(name, dense))


def _lend(block: Block, statistics: dict[str, LayerStatistics]) -> None:
    """Give weights that saw no input the mean Σ x_j² of those of their kind (the other experts) that did."""
    kinds: dict[tuple[str, tuple[int, int]], list[LayerStatistics]] = {}
    for weight in block.weights:
        # Experts differ in a number alone: "experts.3.up" and "experts[3]" are of one kind each.
        kind = kind_of(weight.name), weight.shape
        kinds.setdefault(kind, []).append(statistics[weight.name])
    for alike in kinds.values():
        seen = [found.squared_sum for found in alike if found.tokens]
        if 0 < len(seen) < len(alike):
            mean = torch.stack(seen).mean().item()
            for found in alike:
                found.stand_in = None if found.tokens else mean


@contextmanager
def observing(model: nn.Module, block: Block, observer: Observes, awaited: Awaited | None = None) -> Iterator[None]:
    """Hooks that report every input of the block's weights to `observer`, and then to `awaited`."""
    fused = [weight for weight in block.weights if weight.expert is not None]
    around = {weight for weight in block.weights if weight.expert is None and weight.is_read_around(model)}
    with ExitStack() as stack:
        for weight in block.weights:
            module = model.get_submodule(weight.module)
            # An embedding looks its rows up, and multiplies nothing.
            if weight.expert is None and not isinstance(module, nn.Embedding):
                handle = module.register_forward_pre_hook(_hook(observer, weight, awaited), with_kwargs=True)
                stack.callback(handle.remove)
        for module in {weight.module: model.get_submodule(weight.module) for weight in fused}.values():
            stack.enter_context(one_expert_at_a_time(module))
        if fused:
            stack.enter_context(_WatchProducts(model, block, observer.observe))
        if around:
            stack.enter_context(_WatchUncalled(model, around, observer.observe, awaited))
        yield


def _hook(observer: Observes, weight: Weight, awaited: Awaited | None) -> Callable:
    def observe(module, args, kwargs):
        observer.observe(weight, args[0] if args else next(iter(kwargs.values())))
        if awaited is not None:
            awaited.given(weight.name)

    return observe


class _WatchProducts(TorchFunctionMode):
    """Reports every product of an input with one slice of a fused parameter, or with all of them at once."""

    def __init__(self, model: nn.Module, block: Block, observe: Callable[[Weight, Tensor], None]):
        """Watch products with parts of the block's fused parameters; `observe` gets the inputs, (..., in_features)."""
        super().__init__()
        weights = [weight for weight in block.weights if weight.expert is not None]
        self.block = block
        self.observe = observe
        self.owners = {(w.module, w.attribute): (model.get_submodule(w.module), w) for w in weights}
        self.weights = {(w.module, w.attribute, w.expert): w for w in weights}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if len(args) >= 2 and isinstance(args[1], Tensor):
            if function in _PRODUCTS and args[1].dim() == 2:
                # `linear` takes (out, in) as its second argument, the products of matrices (in, out).
                matrix = args[1] if function is nn.functional.linear else args[1].t()
                weight = self._slice(matrix)
                if weight is not None:
                    self.observe(weight, args[0])
            elif function in _BATCHED and args[0].dim() == args[1].dim() == 3:
                self._observe_each(args[0], args[1])
        return function(*args, **(kwargs or {}))

    def _observe_each(self, inputs: Tensor, matrices: Tensor) -> None:
        """Of (experts, tokens, in_features) and (experts, in_features, out_features), what each matrix is given."""
        if self._slice(matrices[0].t()) is None:
            return  # scores of attention, and no weights
        for rows, matrix in zip(inputs, matrices):
            weight = self._slice(matrix.t())
            # Each is handed every token here: zeros are those of other experts, and did not reach this one.
            reached = rows if rows.is_meta else rows[rows.any(dim=-1)]
            if weight is not None and len(reached):
                self.observe(weight, reached)

    def _slice(self, matrix: Tensor) -> Weight | None:
        """The expert whose matrix, (out_features, in_features), this is a view of."""
        for (module, attribute), (owner, one) in self.owners.items():
            parameter = getattr(owner, attribute)
            # A slice is a new tensor every time: where its memory begins is all that tells which expert it is.
            distance = matrix.data_ptr() - parameter.data_ptr()
            if 0 <= distance < parameter.nbytes and matrix.dtype == parameter.dtype:
                stacked = one.stacked(parameter)
                expert = distance // (stacked.stride(0) * parameter.element_size())
                weight = self.weights.get((module, attribute, expert))
                # Square matrices have the same shape both ways round, but not the same strides.
                stored = matrix.t() if weight and weight.transposed else matrix
                if weight and stored.stride() != stacked.stride()[1:]:
                    raise UnprunableError(
                        f"{module}.{attribute} is stored as the transpose of what `is_transposed` of its module says; "
                        f"leave it dense with exclude=['{attribute}'], {self._share(attribute):.1%} of this block."
                    )
                return weight
        return None

    def _share(self, attribute: str) -> float:
        return sum(w.size for w in self.weights.values() if w.attribute == attribute) / self.block.size


class _WatchUncalled(TorchFunctionMode):
    """Reports what matrices multiply whose modules nobody calls: W · X, X being (..., in_features, tokens)."""

    def __init__(
        self,
        model: nn.Module,
        weights: Collection[Weight],
        observe: Callable[[Weight, Tensor], None],
        awaited: Awaited | None,
    ):
        super().__init__()
        self.observe, self.awaited = observe, awaited
        self.owners = [(model.get_submodule(weight.module), weight) for weight in weights]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor) and args[1].dim() >= 2:
            # a call of `nn.Linear` has its matrix on the other side
            weight = next((each for owner, each in self.owners if args[0] is getattr(owner, each.attribute)), None)
            if weight is not None:
                self.observe(weight, args[1].transpose(-1, -2))
                if self.awaited is not None:
                    self.awaited.given(weight.name)
        return function(*args, **(kwargs or {}))
