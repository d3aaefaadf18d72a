"""How a model calls its blocks, recorded without running them: what a walk replays block by block.

While calls are recorded, every block but the first hands its input straight on. Masks, position embeddings and other
arguments do not depend on the activations, so each block's own are learnt at the price of the embeddings; that the
model really feeds every block with the output of the one before is checked, not assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Stack, UnprunableError


class _AllRecorded(Exception):
    """Raised in the last block: the rest of the model need not run."""


@dataclass
class BlockCalls:
    """The arguments of every block of a stack for every batch, and the activations that flow between them.

    Attributes:
        hidden: per batch, the input of the block at which the walk stands, (samples, ..., hidden size).
        arguments: per batch and block, (positional, keyword) arguments except the hidden states.
        extras: per batch, what a block returns behind the hidden states; `None` where it returns those alone.
        padding: per batch, the positions that are not padding, (samples, length) bool; `None` where all count.
    """

    hidden: list[Tensor] = field(default_factory=list)
    arguments: list[list[tuple[tuple, dict]]] = field(default_factory=list)
    extras: list[tuple | None] = field(default_factory=list)
    padding: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.arguments)

    def run(self, block: nn.Module, index: int, batch: int) -> Tensor:
        """The hidden states that `block`, the stack's block `index`, makes of those of `batch`."""
        args, kwargs = self.arguments[batch][index]
        output = block(self.hidden[batch], *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def output(self, hidden: Tensor, batch: int) -> Any:
        """`hidden` as a block of this stack returns it."""
        return hidden if self.extras[batch] is None else (hidden, *self.extras[batch])


@torch.no_grad()
def capture_calls(model: nn.Module, stack: Stack, batches: Sequence[Mapping[str, Tensor]]) -> BlockCalls:
    """The calls of every block of `stack` for every batch; the stacks before it run as they are.

    Raises:
        UnprunableError: the blocks are not called once each and in order, or something happens between them.
    """
    calls = BlockCalls()
    modules = [model.get_submodule(block.name) for block in stack.blocks]
    for batch in batches:
        recorder = _Recorder(model, stack, modules, calls)
        with replaced_forwards(modules, recorder.replacement):
            try:
                feed(model, batch)
            except _AllRecorded:
                pass
        if len(recorder.arguments) < len(modules):
            raise UnprunableError(
                f"{type(model).__name__} ran {len(recorder.arguments)} of the {len(modules)} blocks of {stack.name}; "
                "they cannot be walked one after the other."
            )
        earlier = calls.arguments[-1] if calls.arguments else None
        calls.arguments.append(_shared(recorder.arguments, earlier))
        calls.extras.append(recorder.extras)
        padding = batch.get("attention_mask")
        everything = padding is None or bool(padding.all()) or padding.shape != recorder.hidden.shape[:2]
        calls.hidden.append(recorder.hidden)
        calls.padding.append(None if everything else padding.bool())
    return calls


class _Recorder:
    """Stands in for the blocks during one forward pass."""

    def __init__(self, model: nn.Module, stack: Stack, modules: Sequence[nn.Module], calls: BlockCalls):
        self.model, self.stack, self.modules = model, stack, modules
        self.arguments: list[tuple[tuple, dict]] = []
        self.hidden: Tensor | None = None
        self.passed: Tensor | None = None
        self.extras: tuple | None = None
        # a first batch tells what a block returns; plain hidden states need no real block any more
        self.run_first = not calls.extras or calls.extras[0] is not None

    def replacement(self, index: int, forward: Callable) -> Callable:
        """What block `index` does instead of its `forward`."""

        def record(*args, **kwargs):
            hidden, args, kwargs = _split_hidden(args, kwargs)
            name = self.stack.blocks[index].name
            if index != len(self.arguments):
                raise UnprunableError(
                    f"{type(self.model).__name__} calls {name} out of order or more than once; "
                    "only blocks that run once each, one after the other, can be walked."
                )
            if index and hidden is not self.passed:
                raise UnprunableError(
                    f"{type(self.model).__name__} changes the activations between the blocks before {name}; "
                    "they cannot be walked one after the other."
                )
            self.arguments.append((args, kwargs))
            if index == 0:
                self.hidden = hidden
                if self.run_first:
                    output = forward(hidden, *args, **kwargs)
                    if not isinstance(output, Tensor):
                        hidden, *rest = output
                        self.extras = tuple(rest)
            if index + 1 == len(self.modules):
                raise _AllRecorded
            self.passed = hidden
            return hidden if self.extras is None else (hidden, *self.extras)

        return record


def _split_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """The hidden states of a block's call, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    for name in ("hidden_states", "x", "inputs"):
        if name in kwargs:
            return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}
    raise UnprunableError(f"A block is called without hidden states; its arguments are {', '.join(kwargs)}.")


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """The modules with `make(index, forward)` in place of their forward, for as long as the context is open."""
    own = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = make(index, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


@torch.no_grad()
def run_behind(model: nn.Module, stack: Stack, calls: BlockCalls, batch: Mapping[str, Tensor], number: int) -> None:
    """Run what comes after the blocks of `stack` on the hidden states that `calls` holds, and not the blocks."""
    modules = [model.get_submodule(block.name) for block in stack.blocks]

    def make(index: int, forward: Callable) -> Callable:
        return lambda *args, **kwargs: calls.output(calls.hidden[number], number)

    with replaced_forwards(modules, make):
        feed(model, batch)


def feed(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """The model's output for a batch, without a cache.

    An encoder-decoder that is given no decoder input decodes its own input.
    """
    accepted = inspect.signature(model.forward).parameters
    flexible = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    device = None if hasattr(model, "hf_device_map") else model.device
    inputs = {name: value.to(device) if device else value for name, value in batch.items()}
    if "use_cache" in accepted or (flexible and hasattr(model.config, "use_cache")):
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs and "input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs)


def _shared(value: Any, earlier: Any) -> Any:
    """`value` with every tensor that equals its counterpart in `earlier` replaced by it: masks are kept once."""
    if isinstance(value, Tensor):
        alike = isinstance(earlier, Tensor) and value.shape == earlier.shape and value.dtype == earlier.dtype
        return earlier if alike and value.device == earlier.device and torch.equal(value, earlier) else value
    if isinstance(value, dict):
        known = earlier if isinstance(earlier, dict) else {}
        return {key: _shared(item, known.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        known = earlier if isinstance(earlier, (list, tuple)) and len(earlier) == len(value) else [None] * len(value)
        return type(value)(_shared(item, old) for item, old in zip(value, known))
    return value
