"""One walk over the blocks: what every one-shot pruner does, said once.

for block in walk_blocks(model, architecture, batches):   # first block first
    for weight in block.weights:
        tensor, statistics = block.tensor(weight), block.statistics[weight.name]
        ...                                               # change the tensor, then say so: block.changed(weight)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .architecture import Architecture, Block, Stack, UnprunableError, Weight
from .capture import BlockCalls, capture_calls, run_behind
from .observation import Observer, observing
from .offload import resident
from .statistics import LayerStatistics


@dataclass(frozen=True)
class WalkedBlock:
    """The block at which a walk stands: its weights on their device, and the statistics of their inputs."""

    block: Block
    statistics: Mapping[str, LayerStatistics]
    model: nn.Module = field(repr=False)
    changes: set[str] = field(repr=False)

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.block.weights

    def tensor(self, weight: Weight) -> Tensor:
        """The live weight, (out_features, in_features); the walk sees what is written to it."""
        return weight.tensor(self.model)

    def changed(self, weight: Weight) -> None:
        """Say that `tensor(weight)` was written to, so that an offloaded weight is written back."""
        self.changes.add(f"{weight.module}.{weight.attribute}")


@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Mapping[str, Tensor]] | None,
    *,
    gram: bool = False,
    sequential: bool = True,
    progress: Callable[[Sequence[Block]], Iterable[Block]] = iter,
) -> Iterator[WalkedBlock]:
    """Each block with the statistics of its inputs, first block first.

    The caller may change a block's weights before it asks for the next one. With `sequential` the next block is given
    the outputs of the block as the caller left it (two forward passes per block), otherwise those that it had before
    (one). One block's activations are alive at a time.

    Args:
        batches: inputs of the model by name, first dimension the samples; `None` runs nothing and gives no statistics.
        gram: collect X·Xᵀ as well.
        progress: wraps the sequence of blocks, as tqdm does.

    Raises:
        ValueError: NaN or infinities in the input of a weight, which it names.
        UnprunableError: the model does not run its blocks one after the other.
    """
    blocks = iter(progress(architecture.blocks))
    if batches is None:
        for block in blocks:
            with resident(model, _modules(block)) as changes:
                yield WalkedBlock(block, {}, model, changes)
        return
    training = model.training
    model.eval()
    try:
        early = (
            {} if sequential else {stack.name: capture_calls(model, stack, batches) for stack in architecture.stacks}
        )
        for stack in architecture.stacks:
            calls = early.pop(stack.name, None) or capture_calls(model, stack, batches)
            needed = architecture.head is not None and stack is architecture.stacks[-1]
            for index, block in enumerate(stack.blocks):
                next(blocks)
                last = index + 1 == len(stack.blocks) and not needed
                yield from _walk_block(model, block, calls, index, gram, sequential, last)
        if architecture.head is not None:
            yield from _walk_head(model, next(blocks), stack, calls, batches, gram)
        next(blocks, None)  # lets a progress bar finish
    finally:
        model.train(training)


def _walk_block(
    model: nn.Module, block: Block, calls: BlockCalls, index: int, gram: bool, sequential: bool, last: bool
) -> Iterator[WalkedBlock]:
    """One step of the walk: collect, hand out, move the activations on (unless it is the last)."""
    module = model.get_submodule(block.name)
    with resident(model, [block.name]) as changes:
        observer = Observer(gram)
        with observing(model, block, observer):
            for number in range(len(calls)):
                observer.start_batch(len(calls.hidden[number]), calls.padding[number])
                output = calls.run(module, index, number)
                if not sequential:
                    calls.hidden[number] = output
        yield WalkedBlock(block, _checked(block, observer), model, changes)
        if sequential and not last:
            for number in range(len(calls)):
                calls.hidden[number] = calls.run(module, index, number)


def _walk_head(
    model: nn.Module,
    head: Block,
    stack: Stack,
    calls: BlockCalls,
    batches: Sequence[Mapping[str, Tensor]],
    gram: bool,
) -> Iterator[WalkedBlock]:
    """The weights outside the blocks, on what the last stack gives."""
    with resident(model, _modules(head)) as changes:
        observer = Observer(gram)
        with observing(model, head, observer):
            for number, batch in enumerate(batches):
                observer.start_batch(len(calls.hidden[number]), calls.padding[number])
                run_behind(model, stack, calls, batch, number)
        yield WalkedBlock(head, _checked(head, observer), model, changes)


def _modules(block: Block) -> list[str]:
    return list(dict.fromkeys(weight.module for weight in block.weights))


def _checked(block: Block, observer: Observer) -> dict[str, LayerStatistics]:
    """The block's statistics, finite and, where experts are watched, really seen."""
    fused: dict[str, int] = {}
    for weight in block.weights:
        if weight.expert is not None:
            parameter = f"{weight.module}.{weight.attribute}"
            seen = observer.statistics.get(weight.name)
            fused[parameter] = fused.get(parameter, 0) + (seen.tokens if seen else 0)
    for parameter, tokens in fused.items():
        if tokens == 0:
            raise UnprunableError(
                f"{parameter}: what its experts multiply could not be observed; leave them dense with "
                f"exclude=['{parameter}'] or choose a method that needs no inputs."
            )
    statistics = observer.finish(block)
    for weight in block.weights:
        if not statistics[weight.name].squared_sum.isfinite().all():
            raise ValueError(
                f"The input of {weight.name} holds NaN or infinities; try another dtype (bfloat16 or float32) or other "
                "text. Blocks before it may already be pruned in memory: load the model again."
            )
    return statistics
