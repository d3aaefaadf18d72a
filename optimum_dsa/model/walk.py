"""One walk over the blocks: what every one-shot pruner does, said once.

for block in walk_blocks(model, architecture, batches):   # first block first
    for group in block.groups():                          # matrices that multiply the same input: q, k, v; o; ...
        for weight in group.weights:
            tensor, statistics = block.tensor(weight), group.statistics[weight.name]
            ...                                           # change the tensor, then say so: block.changed(weight)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from .architecture import Architecture, Block, Stack, UnprunableError, Weight
from .calls import BlockCalls, capture_calls, check_calls, run_behind
from .dense import AsDense, DenseInputs, DenseStream, Replay
from .observer import Observer, Unheard, observing
from .offload import resident
from .padding import real_tokens, without_padding
from .residual import watching_additions
from .statistics import CollectedStatistics, LayerStatistics


# What a walk can collect of each weight's input: "inputs" (Σ x²), "gram" (X·Xᵀ as well), "cross_gram" (X_dense·Xᵀ),
# and with it "residual" (what the residual stream lacks where a weight's outputs are added to it); and of each block
# "outputs" (what the dense model gives in its place, and the block to be run again beside it).
Reads = frozenset[str]
_READS = {"nothing": frozenset(), "inputs": frozenset({"inputs"}), "gram": frozenset({"inputs", "gram"})}


def reads_of(fact: str) -> Reads:
    """What the fact `reads` of a registered metric, update or allocator stands for."""
    if fact not in _READS:
        raise ValueError(f"A registered operation reads {', '.join(map(repr, _READS))}, got {fact!r}.")
    return _READS[fact]


@dataclass(frozen=True)
class Group:
    """Weights of a block that multiply one and the same input, with its statistics."""

    weights: tuple[Weight, ...]
    statistics: Mapping[str, LayerStatistics]


@dataclass(frozen=True)
class WalkedBlock:
    """The block at which a walk stands: its weights on their device, and the statistics of their inputs.

    `rewritten()` says that a block of which nothing is pruned yet computes the same as before with other weights
    (channels in another order): they are the dense ones from there on.
    """

    block: Block
    statistics: Mapping[str, LayerStatistics]
    model: nn.Module = field(repr=False)
    changes: set[str] = field(repr=False)
    # weights -> statistics of their inputs in the block as it is now; None where nothing is run
    again: Callable[[Sequence[Weight]], Mapping[str, LayerStatistics]] | None = field(default=None, repr=False)
    replay: Replay | None = None  # where "outputs" are read; not of the weights outside the blocks
    # runs the block as it is now on one sample -> all tensors that it leaves behind, see `BlockCalls.everything_of`;
    # None where nothing is run
    run: Callable[[], list[Tensor]] | None = field(default=None, repr=False)
    rewritten: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def name(self) -> str:
        return self.block.name

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.block.weights

    def state(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the block that a checkpoint has and that is here, live, by full name."""
        found = {}
        for name in self.block.modules:
            found |= self.model.get_submodule(name).state_dict(prefix=f"{name}.")
        # of an offloaded model that is not run, the weights alone are brought in
        return {name: value for name, value in found.items() if isinstance(value, Tensor) and not value.is_meta}

    def tensor(self, weight: Weight) -> Tensor:
        """The live weight, (out_features, in_features); the walk sees what is written to it."""
        return weight.tensor(self.model)

    def become(self, values: Mapping[str, Tensor]) -> None:
        """Copy `values` into the tensors of these names, of `state`, and their shapes."""
        live = self.state()
        for name, value in values.items():
            # What is as it should be (norms, mostly) need not be written back to a disk. As bytes, in which -0 is
            # not 0, and which every type has.
            mine, wanted = (tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (live[name], value))
            if torch.equal(mine, wanted):
                continue
            live[name].copy_(value)
            owner, _, attribute = name.rpartition(".")
            if attribute in dict(self.model.get_submodule(owner).named_parameters(recurse=False)):
                self.changed(name)

    def groups(self, true_sequential: bool = False) -> Iterator[Group]:
        """The weights in groups that share an input, in the order in which the block runs them.

        With `true_sequential` each group but the first gets statistics that are collected when its turn comes, from
        the block as the groups before it were left: one more forward pass a group.
        """
        shared: dict[int | tuple[str, str], list[Weight]] = {}
        # Statistics stand in the order in which inputs were seen: the block runs in it, and its code may name another.
        order = {name: number for number, name in enumerate(self.statistics)}
        for weight in sorted(self.weights, key=lambda weight: order.get(weight.name, 0)):
            # Weights that share an input share one and the same object, see `Observer`. The experts of one parameter
            # stay together: they run beside each other, and one alone may see no token.
            own = id(self.statistics.get(weight.name))
            key = own if weight.expert is None else (weight.module, weight.attribute)
            shared.setdefault(key, []).append(weight)
        for number, weights in enumerate(shared.values()):
            found = {weight.name: self.statistics[weight.name] for weight in weights if self.statistics}
            if true_sequential and number and self.again is not None:
                found = self.again(weights)
            yield Group(tuple(weights), found)

    def changed(self, weight: Weight | str) -> None:
        """Say that `tensor(weight)`, or a parameter by its full name, was written to, so that it is written back."""
        self.changes.add(weight if isinstance(weight, str) else f"{weight.module}.{weight.attribute}")


# Tensors made in inference mode have no version counter, by which calls and inputs are told apart.
@torch.inference_mode(False)
@torch.no_grad()
def walk_blocks(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Mapping[str, Tensor]] | CollectedStatistics | None,
    *,
    reads: Collection[str] = _READS["inputs"],
    sequential: bool = True,
    progress: Callable[[Sequence[Block]], Iterable[Block]] = iter,
    as_dense: AsDense | None = None,
    finished: int = 0,
    gram: bool | None = None,
) -> Iterator[WalkedBlock]:
    """Each block with the statistics of its inputs, first block first.

    The caller may change a block's weights before it asks for the next one. With `sequential` the next block is given
    the outputs of the block as the caller left it (two forward passes per block), otherwise those that it had before
    (one). One block's activations are alive at a time. With "cross_gram" in `reads` the dense model's go beside
    them: one forward pass of the dense block more, and one with every later group of a `true_sequential` caller.

    Args:
        batches (`Sequence[Mapping[str, Tensor]]`): inputs of the model by name, first dimension the samples. What an
            attention mask marks as padding is cut off. `None` runs nothing and gives no statistics, and
            `CollectedStatistics` runs nothing and gives those.
        reads (`Collection[str]`, defaults to `{"inputs"}`): what is collected of each weight's input: "inputs" is Σ x²
            (and always collected where there are batches), "gram" is X·Xᵀ as well, and "cross_gram" X_dense·Xᵀ of
            what the dense model gives in the place of X, for all weights that every token reaches. "residual", beside
            "cross_gram", is `LayerStatistics.lack` of the weights whose outputs are added to the residual stream.
            "outputs" is a `Replay` of every block of a stack.
        progress (`Callable[[Sequence[Block]], Iterable[Block]]`, defaults to `iter`): wraps the sequence of blocks, as
            tqdm does.
        as_dense (`AsDense`, *optional*): a context in which the model computes with its dense weights, for a caller
            who does not write to them; by default a copy of one block's is kept.
        finished (`int`, defaults to 0): so many blocks, the first ones, come without statistics: the caller makes them
            what an earlier walk left, and the blocks after them see what they would have seen then.
        gram (`bool`, *optional*): earlier name of "gram" in `reads`.

    Raises:
        ValueError: NaN or infinities in the input of a weight, which it names; "cross_gram" of a walk that runs
            nothing, or in which nothing before a block is pruned.
        UnprunableError: the model does not run its blocks one after the other.
    """
    if gram is not None:
        warnings.warn("walk_blocks(gram=True) is walk_blocks(reads={'inputs', 'gram'}).", FutureWarning, stacklevel=2)
    gram, beside = gram or "gram" in reads, {"cross_gram", "outputs"} & set(reads)
    if beside and (not sequential or isinstance(batches, CollectedStatistics)):
        raise ValueError(
            f"{' and '.join(sorted(beside))}: what the dense model has beside a pruned one is of a walk with "
            "sequential=True over batches of inputs; walk so, or do not read it."
        )
    blocks = iter(progress(architecture.blocks))
    if batches is None or isinstance(batches, CollectedStatistics):
        yield from _walk_still(model, blocks, batches.statistics if batches else {})
        return
    # Padding goes first: what is never run needs no mask, and costs no time.
    batches = [part for batch in batches for part in without_padding(batch)]
    real = [real_tokens(model, batch) for batch in batches]
    # Module by module: parts of a model may be frozen in eval mode on purpose.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        samples = _sample_calls(model, architecture, batches[0])
        # Of the unpruned model, for all stacks at once: an earlier stack may be pruned before a later one is captured.
        ahead = architecture.stacks if beside or not sequential else ()
        early = {stack.name: capture_calls(model, stack, batches) for stack in ahead}
        for stack in architecture.stacks:
            calls = capture_calls(model, stack, batches) if sequential else early.pop(stack.name)
            # Arguments of its own: a block may leave in them what a later one reads (shared keys and values).
            calls.sample = samples[stack.name]
            dense = DenseStream(early.pop(stack.name), calls.hidden, as_dense, reads) if beside else None
            needed = architecture.head is not None and stack is architecture.stacks[-1]
            yield from _walk_stack(model, stack, blocks, calls, real, gram, sequential, needed, dense, finished)
            finished = max(finished - len(stack.blocks), 0)
        if architecture.head is not None:
            yield from _walk_head(model, next(blocks), stack, calls, batches, real, gram, dense, finished > 0)
        next(blocks, None)  # lets a progress bar finish
    finally:
        for module in training:
            module.training = True


def _sample_calls(model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]) -> dict[str, BlockCalls]:
    """Stack -> the calls of its blocks for the first sample of a batch, (samples, length, ...), checked."""
    # One sample tells how blocks are called, and an error comes before hours of work.
    one = {name: value[:1] for name, value in batch.items()}
    return {stack.name: check_calls(model, stack, one) for stack in architecture.stacks}


def _walk_still(
    model: nn.Module, blocks: Iterable[Block], collected: Mapping[str, LayerStatistics]
) -> Iterator[WalkedBlock]:
    """The blocks, of which nothing is run, with the statistics that are there."""
    for block in blocks:
        with resident(model, _modules(block)) as changes:
            found = {weight.name: collected[weight.name] for weight in block.weights if collected}
            yield WalkedBlock(block, found, model, changes)


def _walk_stack(
    model: nn.Module,
    stack: Stack,
    blocks: Iterator[Block],
    calls: BlockCalls,
    real: Sequence[Tensor | None],
    gram: bool,
    sequential: bool,
    needed: bool,
    dense: DenseStream | None,
    finished: int,
) -> Iterator[WalkedBlock]:
    """The blocks of a stack, the first of them `finished`; `needed`: the head may read what the last one gives."""
    count = len(stack.blocks)
    for index, block in enumerate(stack.blocks):
        next(blocks)
        # A block is not run again unless somebody reads what it gives: a later one, or the head.
        read = finished <= count if needed else max(index + 1, finished) < count
        yield from _walk_block(model, block, calls, index, real, gram, sequential, not read, dense, index < finished)


def _walk_block(
    model: nn.Module,
    block: Block,
    calls: BlockCalls,
    index: int,
    real: Sequence[Tensor | None],
    gram: bool,
    sequential: bool,
    last: bool,
    dense: DenseStream | None,
    finished: bool,
) -> Iterator[WalkedBlock]:
    """One step of the walk: collect, hand out, move the activations, (samples, ..., hidden size), on (unless last).

    Of a `finished` block nothing is collected.
    """
    module = model.get_submodule(block.name)

    def collect(weights: Sequence[Weight], move_on: bool = False) -> Mapping[str, LayerStatistics]:
        """Statistics of what `weights` multiply in the block as it is now; `move_on` replaces what goes into it."""
        part, observer = replace(block, weights=tuple(weights)), Observer(gram)
        for number in range(len(calls)):
            beside = dense.inputs(model, part, module, index, number) if dense else DenseInputs()
            hidden = calls.hidden[number]
            observer.start_batch(calls.samples[number], real[number], beside.inputs, hidden.shape[:-1].numel())
            watch = watching_additions(model, part, hidden) if dense and "residual" in dense.reads else nullcontext({})
            with observing(model, part, observer), watch as before:
                output = calls.run(module, index, number)
            observer.add_residual(before, beside.before)
            if move_on:
                calls.hidden[number] = output
        return _checked(part, observer)

    def run() -> list[Tensor]:
        """All that the block as it is now leaves behind on one sample."""
        calls.sample.hidden[0] = calls.hidden[0][:1].clone()
        return calls.sample.everything_of(module, index, 0)

    def pass_by() -> Mapping[str, LayerStatistics]:
        """No statistics; what the block is given moves on as in `collect`, and in the same way, to the last bit."""
        run()  # later blocks may read what it leaves in their arguments
        for number in range(0 if last else len(calls)):
            if dense:
                dense.inputs(model, block, module, index, number)
            if not sequential:
                with observing(model, block, Unheard()):
                    calls.hidden[number] = calls.run(module, index, number)
        return {}

    with resident(model, [block.name]) as changes, dense.at(module) if dense else nullcontext():
        again = collect if sequential and not finished else None  # otherwise what went into the block is gone
        found = pass_by() if finished else collect(block.weights, move_on=not sequential)
        replays = dense and "outputs" in dense.reads and not finished
        replay = Replay(module, index, calls, dense) if replays else None
        rewritten = partial(dense.take, module) if dense else lambda: None
        yield WalkedBlock(block, found, model, changes, again, replay, run, rewritten)
        # Still inside `resident`: the changed weights are here, and need not be written and read back first.
        if sequential and not last:
            for number in range(len(calls)):
                calls.hidden[number] = calls.run(module, index, number)


def _walk_head(
    model: nn.Module,
    head: Block,
    stack: Stack,
    calls: BlockCalls,
    batches: Sequence[Mapping[str, Tensor]],
    real: Sequence[Tensor | None],
    gram: bool,
    dense: DenseStream | None,
    finished: bool,
) -> Iterator[WalkedBlock]:
    """The weights outside the blocks, on what the last stack gives, (samples, ..., hidden size)."""
    with resident(model, _modules(head)) as changes:
        observer = Observer(gram)
        for number, batch in enumerate(() if finished else batches):
            paired = dense is not None and "cross_gram" in dense.reads
            beside = dense.inputs_behind(model, head, stack, batch, number).inputs if paired else None
            tokens = calls.hidden[number].shape[:-1].numel()
            observer.start_batch(calls.samples[number], real[number], beside, tokens)
            with observing(model, head, observer):
                run_behind(model, stack, calls, batch, number)
        yield WalkedBlock(head, {} if finished else _checked(head, observer), model, changes)


def _modules(block: Block) -> list[str]:
    return list(dict.fromkeys(weight.module for weight in block.weights))


def _checked(block: Block, observer: Observer) -> dict[str, LayerStatistics]:
    """The block's statistics, finite and, where experts are watched, really seen."""
    # All experts of a parameter together: that no token reached one of them is nothing unusual.
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
                f"exclude=['{parameter.split('.')[-2]}'] or choose a method that needs no inputs."
            )
    statistics = observer.finish(block)
    for weight in block.weights:
        # The sums show it as soon as one number of any input was not finite.
        if not statistics[weight.name].squared_sum.isfinite().all():
            raise ValueError(
                f"The input of {weight.name} holds NaN or infinities; try another dtype (bfloat16 or float32) or "
                "other text. Blocks before it may already be pruned in memory: load the model again."
            )
    return statistics
