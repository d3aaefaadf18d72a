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
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..common.ranks import ALONE, Ranks
from .activations import Held
from .architecture import Architecture, Block, Stack, Weight
from .calls import BlockCalls, capture_calls, check_calls, explained, run_behind
from .dense import AsDense, DenseInputs, DenseStream, Replay
from .gradients import Gradients, check_gradients_can_be_had, collect_gradients, one_by_one
from .observer import AllSeen, Awaited, Observer, Unheard, observing
from .offload import resident
from .padding import is_whole, real_tokens, without_padding
from .residual import watching_additions
from .shared_observer import SharedObserver, as_first, own_batches
from .statistics import CollectedStatistics, LayerStatistics
from .walked import WalkedBlock, checked


# What a walk can collect of each weight's input: "inputs" (Σ x²), "mean" (Σ x as well), "gram" (X·Xᵀ as well),
# "cross_gram" (X_dense·Xᵀ), and with it "residual" (what the residual stream lacks where outputs are added to it); of
# each weight "gradients" (of the dense model's loss) and "regional" (of the norm of what its block gives); and of each
# block "outputs" (what the dense model gives in its place, and the block to be run again beside it).
Reads = frozenset[str]
_READS = {
    "nothing": frozenset(),
    "inputs": frozenset({"inputs"}),
    "mean": frozenset({"inputs", "mean"}),
    "gram": frozenset({"inputs", "gram"}),
    "gradients": frozenset({"inputs", "gradients"}),
    "regional": frozenset({"inputs", "regional"}),
}


def reads_of(fact: str) -> Reads:
    """What the fact `reads` of a registered metric, update or allocator stands for."""
    if fact not in _READS:
        raise ValueError(f"A registered operation reads {', '.join(map(repr, _READS))}, got {fact!r}.")
    return _READS[fact]


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
    true_sequential: bool = False,
    finished: int = 0,
    unseen: int = 0,
    gram: bool | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    held: Held = list,
    ranks: Ranks = ALONE,
) -> Iterator[WalkedBlock]:
    """Each block with the statistics of its inputs, first block first.

    The caller may change a block's weights before it asks for the next one. With `sequential` the next block is given
    the outputs of the block as the caller left it (two forward passes per block), otherwise those that it had before
    (one). One block's activations are alive at a time. With "cross_gram" in `reads` the dense model's go beside
    them: one forward pass of the dense block more, and with `groups(true_sequential=True)` one a group.

    Args:
        batches (`Sequence[Mapping[str, Tensor]]`): inputs of the model by name, first dimension the samples. What an
            attention mask marks as padding is cut off. `None` runs nothing and gives no statistics, and
            `CollectedStatistics` runs nothing and gives those.
        reads (`Collection[str]`, defaults to `{"inputs"}`): what is collected of each weight's input: "inputs" is Σ x²
            (and always collected where there are batches), "mean" is Σ x as well, "gram" is X·Xᵀ as well, and
            "cross_gram" X_dense·Xᵀ of what the dense model gives in the place of X, for all weights that every token
            reaches. "residual", beside "cross_gram", is `LayerStatistics.lack` of the weights whose outputs are added
            to the residual stream. "outputs" is a `Replay` of every block of a stack. "gradients" are those of the
            model's loss as it is when the walk begins, see `collect_gradients`, and "regional" those of the norm of
            what a block gives, for which samples are run one by one.
        progress (`Callable[[Sequence[Block]], Iterable[Block]]`, defaults to `iter`): wraps the blocks, as tqdm does.
        as_dense (`AsDense`, *optional*): a context in which the model computes with its dense weights, for a caller
            who does not write to them; by default a copy of one block's is kept.
        true_sequential (`bool`): the caller asks for `groups(true_sequential=True)` and for no other statistics, so
            that what all groups multiply before any of them is changed is not collected at all.
        finished (`int`, defaults to 0): so many blocks, the first ones, come without statistics: the caller makes them
            what an earlier walk left, and the blocks after them see what they would have seen then.
        unseen (`int`, defaults to 0): so many batches, the last ones, are run along without being counted in any
            statistics: what is fitted to those can be judged by them. With "outputs" in `reads` alone.
        gram (`bool`, *optional*): earlier name of "gram" in `reads`.
        gradients (`Mapping[str, Tensor]`, *optional*): what `collect_gradients` gives, where it is known already.
        held (`Held`, defaults to `list`): makes what activations are kept in, as `held_in` gives it.
        ranks (`Ranks`): processes that walk together, each with all `batches` and the same model: they divide the
            batches, and each has the statistics of all. Not with "outputs" in `reads`.

    Raises:
        ValueError: NaN or infinities in the input of a weight, which it names; "cross_gram" of a walk that runs
            nothing, or in which nothing before a block is pruned.
        UnprunableError: the model does not run its blocks one after the other.
    """
    if gram is not None:
        warnings.warn("walk_blocks(gram=True) is walk_blocks(reads={'inputs', 'gram'}).", FutureWarning, stacklevel=2)
    beside = {"cross_gram", "outputs"} & set(reads)
    if beside and (not sequential or isinstance(batches, CollectedStatistics)):
        raise ValueError(
            f"{' and '.join(sorted(beside))}: what the dense model has beside a pruned one is of a walk with "
            "sequential=True over batches of inputs; walk so, or do not read it."
        )
    still = batches is None or isinstance(batches, CollectedStatistics)
    check_gradients_can_be_had(model, architecture, reads, not still, ranks.alone)
    blocks = iter(progress(architecture.blocks))
    if still:
        yield from _walk_still(model, blocks, batches.statistics if batches else {})
        return
    read = {"gram", *reads} if gram else {*reads}
    how = (sequential, true_sequential, as_dense, finished, unseen, gradients, held, ranks)
    yield from _walk_running(model, architecture, batches, blocks, read, *how)


def _walk_running(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Mapping[str, Tensor]],
    blocks: Iterator[Block],
    reads: Collection[str],
    sequential: bool,
    true_sequential: bool,
    as_dense: AsDense | None,
    finished: int,
    unseen: int,
    gradients: Mapping[str, Tensor] | None,
    held: Held,
    ranks: Ranks,
) -> Iterator[WalkedBlock]:
    """`walk_blocks` over batches, inputs by name, (samples, length, ...); `blocks` is told how far it is."""
    beside, kind = {"cross_gram", "outputs"} & set(reads), Observer if ranks.alone else partial(SharedObserver, ranks)
    watch = partial(kind, "gram" in reads, "mean" in reads)
    # Padding goes first: what is never run needs no mask, and costs no time. Gradients are squared sample by sample.
    cut = one_by_one if "regional" in reads else list
    parts = [[part for each in cut([batch]) for part in without_padding(each)] for batch in batches]
    unseen = sum(map(len, parts[len(parts) - unseen :]))
    batches = [part for split in parts for part in split]
    real = [real_tokens(model, batch) for batch in batches]
    if "gradients" in reads and gradients is None:
        gradients = collect_gradients(model, architecture, batches[: len(batches) - unseen])
    own = Gradients(gradients or {}, "regional" in reads)
    if not ranks.alone:
        batches, real, unseen = own_batches(batches, real, ranks)
    # Module by module: parts of a model may be frozen in eval mode on purpose.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        samples = _sample_calls(model, architecture, batches[0])
        # Of the unpruned model, for all stacks at once: an earlier stack may be pruned before a later one is captured.
        ahead = architecture.stacks if beside or not sequential else ()
        early = {stack.name: capture_calls(model, stack, batches, held) for stack in ahead}
        for stack in architecture.stacks:
            calls = capture_calls(model, stack, batches, held) if sequential else early.pop(stack.name)
            # Arguments of its own: a block may leave in them what a later one reads (shared keys and values).
            calls.sample, calls.unseen, calls.ranks = samples[stack.name], unseen, ranks
            dense = DenseStream(early.pop(stack.name), calls.hidden, as_dense, reads, held) if beside else None
            needed = architecture.head is not None and stack is architecture.stacks[-1]
            yield from _walk_stack(
                model, stack, blocks, calls, real, watch, sequential, needed, dense, finished, true_sequential, own
            )
            finished = max(finished - len(stack.blocks), 0)
        if architecture.head is not None:
            yield from _walk_head(model, next(blocks), stack, calls, batches, real, watch, dense, finished > 0, own)
        next(blocks, None)  # lets a progress bar finish
    finally:
        for module in training:
            module.training = True


def _sample_calls(model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]) -> dict[str, BlockCalls]:
    """Stack -> the calls of its blocks for the first sample of a batch, (samples, length, ...), checked."""
    # One sample tells how blocks are called, and an error comes before hours of work.
    one = batch if is_whole(batch) else {name: value[:1] for name, value in batch.items()}
    with explained(model, one):
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
    watch: Callable[[], Observer],
    sequential: bool,
    needed: bool,
    dense: DenseStream | None,
    finished: int,
    true_sequential: bool,
    gradients: Gradients,
) -> Iterator[WalkedBlock]:
    """The blocks of a stack, the first of them `finished`; `needed`: the head may read what the last one gives."""
    count = len(stack.blocks)
    for index, block in enumerate(stack.blocks):
        next(blocks)
        # A block is not run again unless somebody reads what it gives: a later one, or the head.
        read = finished <= count if needed else max(index + 1, finished) < count
        sample = true_sequential and sequential
        yield from _walk_block(
            model, block, calls, index, real, watch, sequential, not read, dense, index < finished, sample, gradients
        )


@dataclass
class _Shown:
    """What a first batch shows of a block's weights.

    Attributes:
        alone: they are given one input in a batch.
        added: what their outputs are added to is seen.
        last: it is given its input last; `None` where nothing is known.
    """

    alone: set[str] = field(default_factory=set)
    added: set[str] = field(default_factory=set)
    last: str | None = None

    def note(self, block: Block, observer: Observer, before: Collection[str]) -> None:
        """Note what `observer` has seen, and of which weights it was seen what stood `before` their outputs."""
        self.alone, self.added = observer.given_once(), set(before)
        # Experts of one parameter are run one by one where they are watched, and give other last bits.
        if all(weight.expert is None for weight in block.weights):
            self.last = next(reversed(observer.statistics), None)


def _walk_block(
    model: nn.Module,
    block: Block,
    calls: BlockCalls,
    index: int,
    real: Sequence[Tensor | None],
    watch: Callable[[], Observer],
    sequential: bool,
    last: bool,
    dense: DenseStream | None,
    finished: bool,
    sample: bool,
    gradients: Gradients,
) -> Iterator[WalkedBlock]:
    """One step of the walk: collect, hand out, move the activations, (samples, ..., hidden size), on (unless last).

    Of a `finished` block nothing is collected, with `sample` the first batch: it tells groups and their order.
    """
    module, shown = model.get_submodule(block.name), _Shown()
    run_sample = partial(_run_sample, module, calls, index)

    def collect(weights: Sequence[Weight], move_on: bool = False) -> dict[str, LayerStatistics]:
        """Statistics of what `weights` multiply in the block as it is now; `move_on` replaces what goes into it."""
        part, observer, names = replace(block, weights=tuple(weights)), watch(), {weight.name for weight in weights}
        regional = gradients.of_block(model, part, lambda: (calls.run(module, index, n) for n in calls.seen))

        def run(number: int) -> None:
            hidden = calls.hidden[number]  # once: they may be on a disk
            # What comes behind the last weight that is watched need not run; a block may cut longer inputs in parts.
            alike = hidden.shape[1:] == calls.sample.hidden[0].shape[1:]
            stops = alike and shown.alone.issuperset(names)
            ends = stops and shown.last in names
            awaited = Awaited(names, shown.added) if stops else None
            beside = dense.inputs(model, part, module, index, number, awaited, ends) if dense else DenseInputs()
            observer.start_batch(calls.samples[number], real[number], beside.inputs, hidden.shape[:-1].numel())
            awaited = Awaited(names, shown.added) if stops else None
            stream = _watching_additions(model, part, hidden, dense, awaited)
            with suppress(AllSeen), observing(model, part, observer, awaited), stream as before:
                output = calls.run(module, index, number, hidden)
            observer.add_residual(before, beside.before)
            if move_on:
                calls.hidden[number] = output

        observer.over(calls.seen, run)
        return gradients.beside(checked(part, observer), regional)

    def first_batch() -> dict[str, LayerStatistics]:
        observer = Observer(gram=False)
        observer.start_batch(calls.samples[0], real[0])
        hidden = calls.hidden[0]
        with observing(model, block, observer), _watching_additions(model, block, hidden, dense) as before:
            calls.run(module, index, 0, hidden)
        shown.note(block, observer, before)
        return as_first(observer.finish(block), calls.ranks)

    def pass_by() -> dict[str, LayerStatistics]:
        """No statistics; what the block is given moves on as in `collect`, and in the same way, to the last bit."""
        if last:
            return {}
        run_sample()  # later blocks may read what it leaves in their arguments
        for number in calls.seen:
            if dense and not sample:
                dense.inputs(model, block, module, index, number)
            if not sequential:
                with observing(model, block, Unheard()):
                    calls.hidden[number] = calls.run(module, index, number)
        return {}

    found = pass_by if finished else first_batch if sample else partial(collect, block.weights, not sequential)
    with resident(model, [block.name]) as changes, dense.at(module, index, sample, last) if dense else nullcontext():
        again = collect if sequential and not finished else None  # otherwise what went into the block is gone
        replay = Replay(module, index, calls, dense) if dense and "outputs" in dense.reads and not finished else None
        rewritten = partial(dense.take, module, index) if dense else lambda: None
        # The statistics have no name here: they are freed as soon as whoever is given them lets go of them.
        yield WalkedBlock(block, found(), model, changes, again, replay, run_sample, rewritten, sampled=sample)
        # Still inside `resident`: the changed weights are here, and need not be written and read back first.
        if sequential and not last:
            for number in range(len(calls)):
                calls.hidden[number] = calls.run(module, index, number)


def _run_sample(module: nn.Module, calls: BlockCalls, index: int) -> list[Tensor]:
    """All that the block, number `index`, as it is now leaves behind on one sample."""
    calls.sample.hidden[0] = calls.hidden[0][: calls.sample.samples[0]].clone()
    return calls.sample.everything_of(module, index, 0)


def _watching_additions(
    model: nn.Module, part: Block, hidden: Tensor, dense: DenseStream | None, awaited: Awaited | None = None
) -> AbstractContextManager[Mapping[str, Tensor]]:
    """`watching_additions` from `hidden`, (samples, ..., hidden size), on, where what the stream lacks is read."""
    reads = dense is not None and "residual" in dense.reads
    return watching_additions(model, part, hidden, awaited) if reads else nullcontext({})


def _walk_head(
    model: nn.Module,
    head: Block,
    stack: Stack,
    calls: BlockCalls,
    batches: Sequence[Mapping[str, Tensor]],
    real: Sequence[Tensor | None],
    watch: Callable[[], Observer],
    dense: DenseStream | None,
    finished: bool,
    gradients: Gradients,
) -> Iterator[WalkedBlock]:
    """The weights outside the blocks, on what the last stack gives, (samples, ..., hidden size)."""
    with resident(model, _modules(head)) as changes:
        observer = watch()

        def run(number: int) -> None:
            batch = batches[number]
            paired = dense is not None and "cross_gram" in dense.reads
            beside = dense.inputs_behind(model, head, stack, batch, number).inputs if paired else None
            tokens = calls.hidden[number].shape[:-1].numel()
            observer.start_batch(calls.samples[number], real[number], beside, tokens)
            with observing(model, head, observer):
                run_behind(model, stack, calls, batch, number)

        if not finished:
            observer.over(calls.seen, run)
        found = {} if finished else gradients.beside(checked(head, observer))
        yield WalkedBlock(head, found, model, changes)


def _modules(block: Block) -> list[str]:
    return list(dict.fromkeys(weight.module for weight in block.weights))
