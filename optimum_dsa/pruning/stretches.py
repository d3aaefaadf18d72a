"""What is trained at a time: blocks in a row, or a part of one, from what goes into it to what is to come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..model.dense import Replay
from ..model.walked import WalkedBlock


class Stretch(Protocol):
    """A piece of a model that is trained alone.

    Attributes:
        parameters: full name -> what is trained, the live values of any shape.
        samples: sequences of every batch.
        held_out: the batches that nothing is fitted to.
    """

    parameters: Mapping[str, Tensor]
    samples: Sequence[int]
    held_out: Sequence[int]

    def lost(self, batch: int, values: Mapping[str, Tensor]) -> Tensor:
        """How far off a batch is with `values` in the place of `parameters`, a scalar in float32."""
        ...

    def size(self, batch: int) -> Tensor:
        """What that is a share of, a scalar in float32."""
        ...


class _Matched:
    """What is to come out of every batch is given: `targets`, (samples, ..., size) each."""

    targets: Sequence[Tensor]

    def lost(self, batch: int, values: Mapping[str, Tensor]) -> Tensor:
        """Σ ‖what comes out − target‖² over a batch, a scalar in float32."""
        return (self.run(batch, values).float() - self.targets[batch].float()).square().sum()

    def size(self, batch: int) -> Tensor:
        """Σ ‖target‖² over a batch, a scalar in float32."""
        return self.targets[batch].float().square().sum()

    def run(self, batch: int, values: Mapping[str, Tensor]) -> Tensor:
        """What comes out of a batch, (samples, ..., size), with `values` in the place of `parameters`."""
        raise NotImplementedError


class Blocks(_Matched):
    """Blocks in a row: what is to come out is what the dense model has behind the last."""

    def __init__(self, blocks: Sequence[WalkedBlock]):
        self.blocks, last = blocks, blocks[-1].replay
        self.samples, self.targets, self.held_out = last.samples, last.targets, last.held_out
        self.parameters = {name: value for walked in blocks for name, value in trained(walked).items()}

    def run(self, batch: int, values: Mapping[str, Tensor]) -> Tensor:
        hidden = self.blocks[0].replay.inputs[batch]
        for walked in self.blocks:
            hidden = walked.replay.run(batch, hidden, _with(walked.replay.module, walked.name, values))
        return hidden

    @torch.no_grad()
    def move_on(self) -> None:
        """Let the walk go on, from the last block, with what the blocks before it give by now."""
        for batch in range(len(self.samples)):
            hidden = self.blocks[0].replay.inputs[batch]
            for walked in self.blocks[:-1]:
                hidden = walked.replay.run(batch, hidden)
            self.blocks[-1].replay.calls.hidden[batch] = hidden


class Part(_Matched):
    """A module within a block, such as its attention or its MLP, on what it gets in the block as it is now.

    What is to come out is what it gives in the dense model. Where its output is added to what the block gives, which
    is so of the last one as a rule, it is what makes the block's output the dense one's.

    Args:
        name: of the module in the block.
        dense: what it gives in the dense model, per batch (samples, ..., size).
    """

    def __init__(self, walked: WalkedBlock, name: str, dense: Sequence[Tensor]):
        replay, prefix = walked.replay, f"{walked.name}.{name}"
        self.samples, self.held_out = replay.samples, replay.held_out
        self.module, self.prefix = replay.module.get_submodule(name), prefix
        self.parameters = {full: value for full, value in trained(walked).items() if full.startswith(f"{prefix}.")}
        self.calls: list[tuple[tuple, dict]] = []
        self.targets = list(dense)
        with torch.no_grad():
            for batch in range(len(dense)):
                with _calls_of(self.module) as calls:
                    whole = replay.run(batch)
                ((args, kwargs, output),) = calls
                self.calls.append((args, kwargs))
                if batch == 0:
                    added = _is_added(replay, self.module, whole, output)
                if added:
                    self.targets[batch] = replay.targets[batch] - (whole - output)

    def run(self, batch: int, values: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = self.calls[batch]
        return _first(_with(self.module, self.prefix, values)(*args, **kwargs))


def parts(walked: WalkedBlock) -> Iterator[Part]:
    """The parts of a block that hold pruned weights, in the order in which they run; each once it is asked for.

    A block in which a module with pruned weights runs more than once, or not as one of its own, is no parts.
    """
    replay = walked.replay
    inner = [_part_of(replay.module, weight.module.removeprefix(walked.name)) for weight in walked.weights]
    dense: dict[str, list[Tensor]] = {}
    for batch in range(len(replay.samples)):
        for name, outputs in _outputs(replay, list(filter(None, dict.fromkeys(inner))), batch).items():
            dense.setdefault(name, []).extend(outputs)
    if (
        not all(inner)
        or dense.keys() != set(inner)
        or any(len(outputs) != len(replay.samples) for outputs in dense.values())
    ):
        return
    for name, outputs in dense.items():
        yield Part(walked, name, outputs)


def trained(walked: WalkedBlock) -> dict[str, Tensor]:
    """Full name -> what is trained of a block: pruned matrices, and all vectors (norms and biases)."""
    pruned = {f"{weight.module}.{weight.attribute}" for weight in walked.weights}
    return {
        full: parameter.data
        for name, parameter in walked.replay.module.named_parameters()
        if parameter.is_floating_point() and ((full := f"{walked.name}.{name}") in pruned or parameter.dim() == 1)
    }


def _part_of(block: nn.Module, path: str) -> str:
    """Path of the outermost module of a block, other than a list, on the way to `path`; "" where that is the block."""
    names = path.removeprefix(".").split(".") if path else []
    for number in range(1, len(names) + 1):
        if not isinstance(block.get_submodule(name := ".".join(names[:number])), (nn.ModuleList, nn.ModuleDict)):
            return name
    return ""


@torch.no_grad()
def _outputs(replay: Replay, names: Sequence[str], batch: int) -> dict[str, list[Tensor]]:
    """What modules of the dense block give, in the order in which they run: name -> (samples, ..., size) per call."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str):
        return lambda module, args, output: found.setdefault(name, []).append(_first(output))

    handles = [replay.module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        replay.run_dense(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _calls_of(module: nn.Module) -> Iterator[list[tuple[tuple, dict, Tensor]]]:
    """The calls of a module while the context is open: positional and keyword arguments, and what it gave."""
    calls: list[tuple[tuple, dict, Tensor]] = []
    handle = module.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, _first(output))), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def _is_added(replay: Replay, module: nn.Module, whole: Tensor, output: Tensor) -> bool:
    """Whether a change of the module's `output` in the first batch is the same change of the block's, `whole`.

    Both are (samples, ..., size).
    """
    if whole.shape != output.shape:
        return False
    change = output.roll(1, -1) - output

    def other(module, args, found):
        moved = _first(found) + change
        return moved if isinstance(found, Tensor) else (moved, *found[1:])

    handle = module.register_forward_hook(other)
    try:
        return torch.allclose(replay.run(0) - whole, change, rtol=1e-2, atol=1e-3 * float(whole.abs().max()))
    finally:
        handle.remove()


def _with(module: nn.Module, prefix: str, values: Mapping[str, Tensor]) -> Callable:
    """The module computing with those of `values` that are its own, by full name under `prefix`."""
    own = {name.removeprefix(f"{prefix}."): value for name, value in values.items() if name.startswith(f"{prefix}.")}
    # Detached, or what is not trained would be given gradients that cost time, and that nobody takes away again.
    fixed = {name: value.detach() for name, value in module.named_parameters() if name not in own}
    return lambda *args, **kwargs: functional_call(module, fixed | own, args, kwargs)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
