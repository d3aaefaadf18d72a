"""How a model calls its blocks, recorded without running them: what a walk replays block by block.

While calls are recorded, every block but the first hands its input straight on. Masks, position embeddings and other
arguments do not depend on the activations, so each block's own are learnt at the price of the embeddings. That a model
is so made is checked on a sample, not assumed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..common.fences import is_placed, tensor_version
from ..common.ranks import ALONE, Ranks
from .activations import Held
from .adapters import inner_model
from .architecture import Stack, UnprunableError
from .padding import sample_count


logger = logging.getLogger(__name__)


class _AllRecorded(Exception):
    """Raised in the last block: the rest of the model need not run."""


class _Changed(Exception):
    """Raised where the activations are other ones than the block before returned."""


# how a model that cannot be walked can be pruned after all
_WAY_OUT = "choose other blocks with blocks=['...'], or a method and an allocation that need no inputs."


@dataclass
class BlockCalls:
    """The arguments of every block of a stack for every batch, and the activations that flow between them.

    Attributes:
        hidden: per batch, the input of the block at which the walk stands, (samples, ..., hidden size).
        arguments: per batch and block, (positional, keyword) arguments except the hidden states and caches; `None` for
            a block that the batch does not run, as a text does none that looks at pictures.
        added: per batch, block -> what the model adds to its output, (samples, ..., hidden size), as to the tokens of
            a picture what deeper layers of a vision tower see in it.
        extras: per batch, what a block returns behind the hidden states; `None` where it returns those alone.
        samples: per batch, the number of sequences.
        sample: the calls for one sequence alone, of which any block can be run at little cost.
        unseen: how many of the batches, the last ones, are run without being counted in any statistics.
        ranks: the processes that have the batches together.
    """

    hidden: MutableSequence[Tensor] = field(default_factory=list)
    arguments: list[list[tuple[tuple, dict] | None]] = field(default_factory=list)
    added: list[dict[int, Tensor]] = field(default_factory=list)
    extras: list[tuple | None] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    sample: BlockCalls | None = None
    unseen: int = 0
    ranks: Ranks = ALONE

    @property
    def seen(self) -> range:
        """The batches of which statistics are collected."""
        return range(len(self) - self.unseen)

    def __len__(self) -> int:
        return len(self.arguments)

    def run(self, block: Callable, index: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """What `block`, number `index` of the stack, makes of the hidden states, (samples, ..., hidden size).

        These are `hidden`, or what stands in `self.hidden`.
        """
        hidden = self.hidden[batch] if hidden is None else hidden
        if self.arguments[batch][index] is None:
            return hidden
        args, kwargs = self.arguments[batch][index]
        output, added = _split_output(block(hidden, *args, **kwargs))[0], self.added[batch].get(index)
        return output if added is None else output + added

    def everything_of(self, block: nn.Module, index: int, batch: int) -> list[Tensor]:
        """All tensors that `block`, number `index`, leaves behind: what it returns, and what its arguments hold then.

        A block may leave in its arguments what a later one reads (shared keys and values).
        """
        if self.arguments[batch][index] is None:
            return [self.hidden[batch]]
        args, kwargs = self.arguments[batch][index]
        output = block(self.hidden[batch], *args, **kwargs)
        # Copied, as the next run may write into them.
        return [*_tensors(output), *(tensor.clone() for tensor in _tensors((args, kwargs)))]

    def output(self, hidden: Tensor, batch: int) -> Any:
        """`hidden`, (samples, ..., hidden size), as a block of this stack returns it."""
        return hidden if self.extras[batch] is None else (hidden, *self.extras[batch])


@torch.no_grad()
def capture_calls(
    model: nn.Module, stack: Stack, batches: Sequence[Mapping[str, Tensor]], held: Held = list
) -> BlockCalls:
    """The calls of every block of `stack` for every batch, (samples, length, ...); stacks before it run as they are.

    `held` makes what activations are kept in.

    Raises:
        UnprunableError: the blocks are not called in order, or something happens between them.
    """
    calls, zeros = BlockCalls(held()), False
    for batch in batches:
        # a first batch tells what a block returns; plain hidden states need no real block any more
        first = not calls.extras or calls.extras[0] is not None
        recorder = _Recorder(model, stack, first, zeros=zeros)
        try:
            recorder.record(batch)
        except _Changed:
            # Behind blocks that hand zeros on, what comes to the next one is what was added.
            recorder, zeros = _Recorder(model, stack, first, zeros=True), True
            recorder.record(batch)
        calls.arguments.append(_shared(recorder.arguments, calls.arguments[-1] if calls.arguments else None))
        calls.extras.append(recorder.extras)
        calls.hidden.append(recorder.hidden)
        calls.added.append(recorder.added)
        calls.samples.append(sample_count(batch))
    return calls


@torch.no_grad()
def check_calls(model: nn.Module, stack: Stack, batch: Mapping[str, Tensor]) -> BlockCalls:
    """`capture_calls` of one batch; raises `UnprunableError` unless the model, run as it is, calls its blocks so.

    `batch` holds inputs by name, (samples, length, ...).
    """
    # Once with blocks that hand their input on and once for real: what differs depends on the activations.
    captured = capture_calls(model, stack, [batch])
    recorder = _Recorder(model, stack, run_all=True, expected=captured.added[0])
    recorder.record(batch)
    for block, replayed, real in zip(stack.blocks, captured.arguments[0], recorder.arguments):
        if (replayed is None) != (real is None) or not _equal(replayed, real):
            raise UnprunableError(
                f"{type(model).__name__} hands {block.name} more of what the blocks before it compute than its hidden "
                f"states, so they cannot be walked one after the other; {_WAY_OUT}"
            )
    if skipped := [block.name for block, call in zip(stack.blocks, captured.arguments[0]) if call is None]:
        logger.warning(
            "%s runs no %s on its first calibration sample; without inputs, their weights are scored by magnitude.",
            type(model).__name__,
            ", ".join(skipped),
        )
    return captured


class _Recorder:
    """Stands in for the blocks of a stack during one forward pass; hands their input on, or runs them as well.

    With `zeros` it hands on zeros instead, behind which `added` is what the model adds between blocks. With `run_all`
    the model must add what is `expected`, block -> (samples, ..., hidden size).
    """

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        run_first: bool = True,
        run_all: bool = False,
        zeros: bool = False,
        expected: Mapping[int, Tensor] | None = None,
    ):
        self.model, self.stack = model, stack
        self.run_first, self.run_all, self.zeros, self.expected = run_first, run_all, zeros, expected or {}
        self.arguments: list[tuple[tuple, dict] | None] = [None] * len(stack.blocks)
        self.added: dict[int, Tensor] = {}
        self.last = -1  # the block that was called last
        self.before: Tensor | None = None  # what it returned, where the model is to add to that
        self.hidden: Tensor | None = None
        self.passed: Tensor | None = None
        self.version = 0
        self.extras: tuple | None = None

    def record(self, batch: Mapping[str, Tensor]) -> None:
        """Note every call that the model makes of the blocks for a batch, (samples, length, ...)."""
        modules = [self.model.get_submodule(block.name) for block in self.stack.blocks]
        with replaced_forwards(modules, self._replacement), suppress(_AllRecorded):
            feed(self.model, batch)
        kinds = {ran: set() for ran in (True, False)}
        for module, arguments in zip(modules, self.arguments):
            kinds[arguments is not None].add(type(module))
        # Blocks of a kind of their own may be passed by: a text has nothing for those that look at pictures.
        if not kinds[True] or kinds[True] & kinds[False]:
            raise UnprunableError(
                f"{type(self.model).__name__} ran {sum(call is not None for call in self.arguments)} of the "
                f"{len(modules)} blocks of {self.stack.name}, so they cannot be walked; feed it what it needs to run "
                f"them all, {_WAY_OUT}"
            )

    def _replacement(self, index: int, forward: Callable) -> Callable:
        """What block `index` does instead of its `forward`."""

        def replacement(*args, **kwargs):
            hidden, args, kwargs = _split_hidden(args, kwargs)
            self._check_order(index, hidden)
            self.arguments[index] = (args, kwargs)
            if self.last < 0:
                self.hidden = hidden
            if self.run_all or (self.run_first and self.last < 0):
                hidden, self.extras = _split_output(forward(hidden, *args, **kwargs))
            self.last = index
            hidden = torch.zeros_like(hidden) if self.zeros else hidden
            self.before = hidden.clone() if index in self.expected else None
            # An exception is the one way out of a forward pass: head and loss are never computed.
            if index + 1 == len(self.stack.blocks) and not self.run_all:
                raise _AllRecorded
            # An in-place change between blocks leaves the same tensor, with a higher version.
            self.passed, self.version = hidden, tensor_version(hidden)
            return hidden if self.extras is None else (hidden, *self.extras)

        return replacement

    def _check_order(self, index: int, hidden: Tensor) -> None:
        """Raise unless block `index` is next, and `hidden`, (samples, ...), is what the block before it returned."""
        model, block = type(self.model).__name__, self.stack.blocks[index].name
        if index <= self.last:
            raise UnprunableError(
                f"{model} runs {block} out of order or more than once, and only blocks that run once each, one after "
                f"the other, can be walked; {_WAY_OUT}"
            )
        if self.last < 0 or (_is_view_of_all(hidden, self.passed) and tensor_version(hidden) == self.version):
            return
        alike = hidden.shape == self.passed.shape and hidden.dtype == self.passed.dtype
        if self.zeros and alike:
            self.added[self.last] = hidden.clone()
        elif alike and not self.run_all:
            raise _Changed
        elif not alike or self.before is None or not _close(hidden, self.before + self.expected[self.last]):
            raise UnprunableError(
                f"{model} changes the activations between the blocks before {block}, and only blocks that run one "
                f"right after the other can be walked; {_WAY_OUT}"
            )


def _close(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any one shape differ by no more than rounding, by the scale of the first."""
    return bool((value - other).abs().max() <= 1e-2 * value.abs().max())


def _split_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """The hidden states of a block's call, (samples, ...), and its other arguments; no caches: it is called again."""
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    if not args:
        name = next((name for name in ("hidden_states", "x", "inputs") if name in kwargs), None)
        args = (kwargs.pop(name, None),)
    return _tensor(args[0]), args[1:], kwargs


def _split_output(output: Any) -> tuple[Tensor, tuple | None]:
    """The hidden states that a block returns, (samples, ...), and what is behind them; `None` where nothing is."""
    return (output, None) if isinstance(output, Tensor) else (_tensor(output[0]), tuple(output[1:]))


def _tensor(hidden: Any) -> Tensor:
    """`hidden` itself, (samples, ..., hidden size), or an error where it is no single tensor."""
    if isinstance(hidden, Tensor):
        return hidden
    raise UnprunableError(f"A block's hidden states are no single tensor, so it cannot be walked; {_WAY_OUT}")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in an argument or output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _is_view_of_all(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any shape are one and the same memory, seen alike."""
    return value is other or (
        value.data_ptr() == other.data_ptr() and value.shape == other.shape and value.stride() == other.stride()
    )


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """The modules with `make(index, forward)` in place of their forward, for as long as the context is open."""
    # A forward may stand on the module itself (accelerate puts one there), and has to come back.
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
    """Run what comes after the blocks of `stack`, not the blocks, on the hidden states of `calls`, (samples, ...)."""
    modules = [model.get_submodule(block.name) for block in stack.blocks]

    def make(index: int, forward: Callable) -> Callable:
        return lambda *args, **kwargs: calls.output(calls.hidden[number], number)

    with replaced_forwards(modules, make):
        feed(model, batch)


def feed(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """The model's output for a batch, (samples, length, ...), without a cache and the losses of routers.

    An encoder-decoder that is given no decoder input decodes its own input.
    """
    accepted = inspect.signature(inner_model(model).forward).parameters
    flexible = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    # Where accelerate places a model, it moves the inputs itself.
    device = None if is_placed(model) else model.device
    inputs = {name: value.to(device) if device else value for name, value in batch.items()}
    for switch in ("use_cache", "output_router_logits"):
        if switch in accepted or (flexible and hasattr(model.config.get_text_config(), switch)):
            inputs[switch] = False
    alone = not {"decoder_input_ids", "decoder_inputs_embeds", "labels"} & inputs.keys()
    if model.config.is_encoder_decoder and alone and "input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    try:
        return model(**inputs)
    except NotImplementedError as error:
        if not is_placed(model) or "meta tensor" not in str(error):
            raise
        # Llama 4 asks its embedding where it is, DBRX takes experts' rows out of a module that does not run.
        raise UnprunableError(
            f"{type(model).__name__} looks at weights that are on disk or kept back while it does not run them, and "
            "cannot run with them there; load it whole, without device_map (--device-map), or in memory in part "
            "(device_map='auto')."
        ) from None


@contextmanager
def explained(
    model: nn.Module, batch: Mapping[str, Tensor], known: type[Exception] = UnprunableError
) -> Iterator[None]:
    """Makes one `ValueError` of whatever a forward pass ends in whose inputs do not fit: it may raise anything.

    Args:
        batch: what it is fed, (samples, ...) by name.
        known: what is raised on purpose, and says enough.
    """
    try:
        yield
    except (known, UnprunableError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        raise ValueError(
            f"{type(inner_model(model)).__name__} does not run on the first calibration sample ({given}): "
            f"{type(error).__name__}: {' '.join(str(error).split()):.300}; give all that its processor or tokenizer "
            "returns, by name."
        ) from error


def _equal(value: Any, other: Any) -> bool:
    """Whether two arguments are equal in every tensor that they hold."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        alike = value.shape == other.shape and value.dtype == other.dtype
        return alike and torch.allclose(value, other, rtol=1e-2, atol=1e-4, equal_nan=True)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_equal(item, other[key]) for key, item in value.items())
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(value) == len(other) and all(_equal(item, old) for item, old in zip(value, other))
    return isinstance(value, Tensor) == isinstance(other, Tensor)


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
