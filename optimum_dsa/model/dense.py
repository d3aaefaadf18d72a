"""The dense model's activations beside those of the model that is being pruned, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial

import torch
from torch import Tensor, nn

from .architecture import Block, Stack, Weight
from .calls import BlockCalls, run_behind
from .observer import AllSeen, observing
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

    While it stands at a block, what goes into the dense one is alive and, where it need not be run again, what comes
    out of it, and a copy of its weights.

    Args:
        calls (`BlockCalls`): of the dense model; changed as it goes on.
        hidden (`Sequence[Tensor]`): what goes into the first block of the pruned model, per batch (samples, ...,
            hidden size): where it is the same, it is held once.
        as_dense (`AsDense`, *optional*): makes the weights the dense ones; then no copy of a block's is kept.
        reads (`Collection[str]`): what the walk reads; without "cross_gram" no inputs are watched, and with "residual"
            what the residual stream has is, too.

    Attributes:
        outputs: per batch what the dense block gives, (samples, ..., hidden size), once `inputs` was called.
    """

    def __init__(
        self,
        calls: BlockCalls,
        hidden: Sequence[Tensor],
        as_dense: AsDense | None = None,
        reads: Collection[str] = ("cross_gram",),
    ):
        self.calls, self.reads = calls, reads
        for number, (own, other) in enumerate(zip(calls.hidden, hidden, strict=True)):
            calls.hidden[number] = other if torch.equal(own, other) else own
        self.outputs: list[Tensor | None] = []
        self._again = False
        self._given = self._as_dense = as_dense

    @contextmanager
    def at(self, module: nn.Module, index: int, again: bool = False) -> Iterator[None]:
        """Stand at a block, number `index`, that is dense as yet; on leaving, go on to the next one.

        With `again` it is run once more then, and what comes out is not kept beside what goes in until then.
        """
        self.outputs, self._again = [None] * len(self.calls.hidden), again and "outputs" not in self.reads
        if self._given is None:
            # All parameters and not the prunable ones alone: whoever is given the block may change any.
            kept = [parameter.detach().clone() for parameter in module.parameters()]
            self._as_dense = partial(_holding, module, kept)
        yield
        for batch, after in enumerate(self.outputs):
            with self._as_dense():
                self.calls.hidden[batch] = self.calls.run(module, index, batch) if after is None else after
        self.outputs, self._as_dense = [], self._given

    def inputs(
        self, model: nn.Module, part: Block, module: nn.Module, index: int, batch: int, stops: bool = False
    ) -> DenseInputs:
        """What the weights of `part`, some of the block `module`, number `index`, multiply in the dense model.

        With `stops` what comes behind them is not run, unless it is to be kept.
        """
        found, hidden = DenseInputs(), self.calls.hidden[batch]
        watched, known = "cross_gram" in self.reads, self._again or self.outputs[batch] is not None
        # What it gives is the same every time; only what is watched has to be seen again.
        if known and not watched:
            return found
        watch = observing(model, part, found, stops and known) if watched else nullcontext()
        added = watching_additions(model, part, hidden) if "residual" in self.reads else nullcontext({})
        with suppress(AllSeen), self._as_dense(), watch, added as found.before:
            after = self.calls.run(module, index, batch)
            self.outputs[batch] = None if self._again else after
        return found

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
