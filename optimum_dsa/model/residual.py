"""Where a matrix's outputs are added to the residual stream, found by watching what a block adds to what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..common.fences import tensor_version
from .architecture import Block
from .observer import Awaited


_ADDITIONS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_IN_PLACE = {"add_", "__iadd__"}


@contextmanager
def watching_additions(
    model: nn.Module, block: Block, hidden: Tensor, awaited: Awaited | None = None
) -> Iterator[dict[str, Tensor]]:
    """By weight, the residual stream, (samples, ..., hidden size), to which its outputs are added, filled as it runs.

    The stream is the block's input `hidden`, and whatever comes of adding something of its shape to it. A weight has
    no entry where anything is done to its outputs first (a norm, a factor, another matrix's outputs added), or where
    it runs more than once. Of each entry `awaited` is told.
    """
    with ExitStack() as stack:
        watch = _WatchAdditions(hidden, awaited)
        for weight in block.weights:
            if weight.expert is None and weight.shape[0] == hidden.shape[-1]:
                handle = model.get_submodule(weight.module).register_forward_hook(watch.hook(weight.name))
                stack.callback(handle.remove)
        stack.enter_context(watch)
        yield watch.before


class _WatchAdditions(TorchFunctionMode):
    """Follows the residual stream through a block."""

    def __init__(self, hidden: Tensor, awaited: Awaited | None):
        """Begin at the block's input, (samples, ..., hidden size)."""
        super().__init__()
        self._awaited = awaited
        self.before: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        # Held alive: a place in memory is free for another tensor as soon as its own is gone.
        self._stream = {_place(hidden): hidden}
        self._outputs: dict[tuple[int, int], tuple[str, Tensor, int]] = {}

    def hook(self, name: str):
        """A forward hook that notes the outputs of the module that has the weight `name`."""

        def note(module, args, output):
            if name in self._seen or not isinstance(output, Tensor):
                self.before.pop(name, None)
                return
            self._seen.add(name)
            self._outputs[_place(output)] = name, output, tensor_version(output)

        return note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        how = getattr(function, "__name__", "")
        found = self._addition(args) if how in _ADDITIONS and not kwargs else None
        if found is not None:
            name, stream = found
            if name is not None:
                # What is added to in place is no longer what stood there before.
                self.before[name] = stream.clone() if how in _IN_PLACE else stream
                if self._awaited is not None:
                    self._awaited.done(name)
        result = function(*args, **(kwargs or {}))
        if found is not None:
            self._stream[_place(result)] = result
        return result

    def _addition(self, args: tuple) -> tuple[str | None, Tensor] | None:
        """Of two summands, (samples, ...), the stream, and the weight whose outputs the other one is, if any."""
        if len(args) != 2 or not all(isinstance(value, Tensor) for value in args) or args[0].shape != args[1].shape:
            return None
        for outputs, stream in (args, args[::-1]):
            if _place(stream) in self._stream:
                name, _, version = self._outputs.get(_place(outputs), (None, None, None))
                # An in-place change makes them other numbers in the same place.
                return (name if name is not None and tensor_version(outputs) == version else None), stream
        return None


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor of any shape lies, and how much of it: views of all of it (reshaped, dropped out) are one."""
    return tensor.data_ptr(), tensor.numel()
