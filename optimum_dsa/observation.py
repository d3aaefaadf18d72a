"""Watching what each weight of a block multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .architecture import Block, UnprunableError, Weight
from .statistics import LayerStatistics


_PRODUCTS = {nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


class Observer:
    """Collects the `LayerStatistics` of a block's weights over batches.

    Maps that are given the very same tensor (query, key and value) share one `LayerStatistics`. Who shares with whom
    is learnt from the first batch, and checked on the others.
    """

    def __init__(self, gram: bool):
        self.gram = gram
        self.statistics: dict[str, LayerStatistics] = {}
        self.sequences = 0
        self._source: dict[str, str] = {}  # weight -> the weight whose statistics it shares
        self._inputs: dict[tuple[int, int], tuple[str, Tensor]] = {}  # of this batch; holds the tensors alive
        self._padding: Tensor | None = None
        self._first = True

    def start_batch(self, samples: int, padding: Tensor | None) -> None:
        """Begin a batch of `samples` sequences; where `padding`, (samples, length), is False, inputs do not count."""
        self._first = self.sequences == 0
        self.sequences += samples
        self._inputs.clear()
        self._padding = padding

    def observe(self, weight: Weight, inputs: Tensor) -> None:
        """Note that `weight` multiplies `inputs`, (..., in_features)."""
        key = (id(inputs), inputs._version)
        source, _ = self._inputs.setdefault(key, (weight.name, inputs))
        if weight.name not in self._source:
            self._source[weight.name] = source if self._first else weight.name
        expected = self._source[weight.name]
        if expected == weight.name:
            if expected not in self.statistics:
                self.statistics[expected] = LayerStatistics(weight.shape[1], inputs.device, self.gram)
            self.statistics[expected].update_(self._without_padding(inputs))
        elif expected == source:
            self.statistics[weight.name] = self.statistics[source]
        else:
            raise UnprunableError(
                f"{weight.name} and {expected} are given the same input in one batch and different ones in another; "
                f"leave one of them dense with exclude=['{weight.name}']."
            )

    def finish(self, block: Block) -> dict[str, LayerStatistics]:
        """The statistics of every weight of the block, also of those that saw no input."""
        self._inputs.clear()
        for weight in block.weights:
            if weight.name not in self.statistics:
                device = next(iter(self.statistics.values())).device if self.statistics else "cpu"
                self.statistics[weight.name] = LayerStatistics(weight.shape[1], device, self.gram)
            self.statistics[weight.name].sequences = self.sequences
        return self.statistics

    def _without_padding(self, inputs: Tensor) -> Tensor:
        padding = self._padding
        if padding is None or inputs.shape[:-1].numel() != padding.numel():
            return inputs
        return inputs.reshape(-1, inputs.shape[-1])[padding.flatten().to(inputs.device)]


@contextmanager
def observing(model: nn.Module, block: Block, observer: Observer) -> Iterator[None]:
    """Hooks that report every input of the block's weights to `observer` while the context is open."""
    fused = [weight for weight in block.weights if weight.expert is not None]
    with ExitStack() as stack:
        for weight in block.weights:
            module = model.get_submodule(weight.module)
            if weight.expert is None and not isinstance(module, nn.Embedding):
                handle = module.register_forward_pre_hook(_hook(observer, weight), with_kwargs=True)
                stack.callback(handle.remove)
        if fused:
            for module in {weight.module: model.get_submodule(weight.module) for weight in fused}.values():
                stack.enter_context(_one_expert_at_a_time(module))
            stack.enter_context(_WatchProducts(model, fused, observer.observe))
        yield


def _hook(observer: Observer, weight: Weight) -> Callable:
    def observe(module, args, kwargs):
        observer.observe(weight, args[0] if args else next(iter(kwargs.values())))

    return observe


@contextmanager
def _one_expert_at_a_time(module: nn.Module) -> Iterator[None]:
    """The experts' own loop instead of a fused kernel, which shows nobody what each expert is given."""
    config = getattr(module, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    if chosen in (None, "eager"):
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = chosen


class _WatchProducts(TorchFunctionMode):
    """Reports every product of an input with one slice of a fused parameter."""

    def __init__(self, model: nn.Module, weights: list[Weight], observe: Callable[[Weight, Tensor], None]):
        super().__init__()
        self.observe = observe
        self.owners = {(w.module, w.attribute): model.get_submodule(w.module) for w in weights}
        self.weights = {(w.module, w.attribute, w.expert): w for w in weights}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor) and args[1].dim() == 2:
            weight = self._slice(args[1])
            if weight is not None:
                self.observe(weight, args[0])
        return function(*args, **(kwargs or {}))

    def _slice(self, matrix: Tensor) -> Weight | None:
        """The expert whose matrix this is a view of."""
        address = matrix.untyped_storage().data_ptr()
        for (module, attribute), owner in self.owners.items():
            parameter = getattr(owner, attribute)
            if parameter.untyped_storage().data_ptr() == address:
                expert = (matrix.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
                return self.weights.get((module, attribute, expert))
        return None
