"""The dense model's activations beside those of the model that is being pruned, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial

import torch
from torch import Tensor, nn

from .activations import Held
from .architecture import Block, Stack, Weight
from .calls import BlockCalls, run_behind
from .observer import AllSeen, Awaited, observing
from .residual import watching_additions


# Called without arguments: the model computes with its dense weights inside the context.
AsDense = Callable[[], AbstractContextManager[None]]


class DenseInputs:
    """What the weights of a block multiply in the dense model in one batch: by weight, its inputs in order.

    Attributes:
        before: by weight, the residual stream to which its outputs are added, (samples, ..., hidden size).
    """

    def __init__(self):
        self.inputs: dict[str, list[Tensor]] = {}
        self.before: dict[str, Tensor] = {}

    def observe(self, weight: Weight, inputs: Tensor) -> None:
        """Note that `weight` multiplies `inputs`, (..., in_features)."""
        self.inputs.setdefault(weight.name, []).append(inputs)


class DenseStream:
    """Runs the dense block, also when the one in the model is pruned in part, on what the dense blocks before it gave.

    While it stands at a block, what goes into the dense one is alive, a copy of its weights and, unless it is run for
    itself in the end, what comes out.

    Args:
        calls (`BlockCalls`): of the dense model; changed as it goes on.
        hidden (`Sequence[Tensor]`): what goes into the first block of the pruned model, per batch (samples, ...,
            hidden size): where it is the same, it is held once.
        as_dense (`AsDense`, *optional*): makes the weights the dense ones; then no copy of a block's is kept.
        reads (`Collection[str]`): what the walk reads; without "cross_gram" no inputs are watched, and with "residual"
            what the residual stream has is, too.
        held (`Held`): makes what activations are kept in.

    Attributes:
        outputs: per batch what the dense block gives, (samples, ..., hidden size), once `inputs` or `complete` was
            called.
    """

    def __init__(
        self,
        calls: BlockCalls,
        hidden: Sequence[Tensor],
        as_dense: AsDense | None = None,
        reads: Collection[str] = ("cross_gram",),
        held: Held = list,
    ):
        self.calls, self.reads, self._held = calls, reads, held
        for number, (own, other) in enumerate(zip(calls.hidden, hidden, strict=True)):
            calls.hidden[number] = other if torch.equal(own, other) else own
        self.outputs: MutableSequence[Tensor | None] = []
        self._anew = False
        self._given = self._as_dense = as_dense
        self._kept: list[Tensor] = []

    @contextmanager
    def at(self, module: nn.Module, index: int, anew: bool = False, last: bool = False) -> Iterator[None]:
        """Stand at a block, number `index`, that is dense as yet; on leaving, go on to the next one, unless `last`.

        With `anew` what comes out is run for itself, on leaving or when `complete` is called, unless the last `inputs`
        that are asked for have seen it.
        """
        self.outputs, self._anew = self._held([None] * len(self.calls.hidden)), anew
        if self._given is None:
            # All parameters and not the prunable ones alone: whoever is given the block may change any.
            self._kept = [parameter.detach().clone() for parameter in module.parameters()]
            self._as_dense = partial(_holding, module, self._kept)
        yield
        # Batch by batch, so that what goes in goes as what comes out comes.
        for batch in range(0 if last else len(self.outputs)):
            output = self.outputs[batch]
            self.calls.hidden[batch] = self.run(module, index, batch) if output is None else output
        self.outputs, self._as_dense, self._kept = [], self._given, []

    def take(self, module: nn.Module, index: int) -> None:
        """Take the weights of the block, number `index`, as they are now for the dense ones: they compute the same."""
        # But for the last bits: what it gives is of the weights that a resumed walk has as well.
        self.complete(module, index)
        for kept, parameter in zip(self._kept, module.parameters()):
            kept.copy_(parameter)

    @torch.no_grad()
    def complete(self, module: nn.Module, index: int) -> None:
        """Have `outputs` of every batch of the block `module`, number `index`."""
        for batch, output in enumerate(self.outputs):
            if output is None:
                self.outputs[batch] = self.run(module, index, batch)

    def inputs(
        self,
        model: nn.Module,
        part: Block,
        module: nn.Module,
        index: int,
        batch: int,
        awaited: Awaited | None = None,
        ends: bool = False,
    ) -> DenseInputs:
        """What the weights of `part`, some of the block `module`, number `index`, multiply in the dense model.

        What comes behind what is `awaited` is not run, unless it is to be kept; with `ends` no others are asked for.
        """
        found, hidden = DenseInputs(), self.calls.hidden[batch]
        watched, known = "cross_gram" in self.reads, self.outputs[batch] is not None
        wanted = not known and (ends or not self._anew)
        # What it gives is the same every time; only what is watched has to be seen again.
        if not wanted and not watched:
            return found
        awaited = None if wanted else awaited
        watch = observing(model, part, found, awaited) if watched else nullcontext()
        added = watching_additions(model, part, hidden, awaited) if "residual" in self.reads else nullcontext({})
        with suppress(AllSeen), watch, added as found.before:
            # What is watched is followed from this very tensor on.
            output = self.run(module, index, batch, hidden)
            # Of the first time: a walk that passes the block by has no other, and is to go on alike to the last bit.
            if wanted:
                self.outputs[batch] = output
        return found

    def run(self, module: nn.Module, index: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """What the dense block, `module` of number `index`, makes of a batch or of `hidden`: (samples, ..., size)."""
        with self._as_dense():
            return self.calls.run(module, index, batch, hidden)

    def inputs_behind(
        self, model: nn.Module, head: Block, stack: Stack, batch: Mapping[str, Tensor], number: int
    ) -> DenseInputs:
        """What the weights of `head`, behind the blocks of `stack`, multiply in the dense model.

        `batch`, number `number`, holds inputs by name, (samples, length, ...). The head is dense as yet.
        """
        found = DenseInputs()
        with observing(model, head, found):
            run_behind(model, stack, self.calls, batch, number)
        return found


class Replay:
    """A block to be run again on what goes into it, batch by batch, beside the dense model's.

    Attributes:
        module: the block in the model.
        index: its number in its stack.
        calls: of the model, as the walk goes on with them.
        inputs: what goes into it, per batch (samples, ..., hidden size), while the walk stands at it.
        samples: sequences of every batch.
        is_last: whether it is the last of its stack.
    """

    def __init__(self, module: nn.Module, index: int, calls: BlockCalls, dense: DenseStream):
        self.module, self.index, self.calls, self._dense = module, index, calls, dense
        self.inputs, self.samples = calls.hidden.copy(), tuple(calls.samples)
        self.is_last = index + 1 == len(calls.arguments[0])

    @property
    def targets(self) -> Sequence[Tensor]:
        """What the dense block gives behind the dense blocks before it, per batch (samples, ..., hidden size)."""
        self._dense.complete(self.module, self.index)
        return self._dense.outputs

    @property
    def held_out(self) -> Sequence[int]:
        """The batches that no statistics have seen."""
        return range(len(self.calls.seen), len(self.samples))

    def run(self, batch: int, hidden: Tensor | None = None, block: Callable | None = None) -> Tensor:
        """What `block`, by default the model's, makes of `hidden`, by default its input, (samples, ..., size)."""
        hidden = self.inputs[batch] if hidden is None else hidden
        return self.calls.run(block or self.module, self.index, batch, hidden)

    def run_dense(self, batch: int) -> Tensor:
        """As `targets`, of one batch, run again."""
        return self._dense.run(self.module, self.index, batch)


@contextmanager
def _holding(module: nn.Module, values: list[Tensor]) -> Iterator[None]:
    """The module's parameters being `values`, of their shapes, while the context is open."""
    parameters = list(module.parameters())
    own = [parameter.data for parameter in parameters]
    try:
        # Pointers move and no weight does: a batch of a few tokens costs no copy of the block.
        for parameter, value in zip(parameters, values):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own):
            parameter.data = value
