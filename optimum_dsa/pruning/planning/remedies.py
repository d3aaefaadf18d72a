"""What to change where a plan does not fit: the first single thing that suffices, or the fewest together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from ..configuration import AUTO, DSAConfig
from .memory import Text, in_dtype
from .shape import ModelShape
from .tried import last


@dataclass(frozen=True)
class Asked:
    """What a plan is made for, and what a remedy changes."""

    shape: ModelShape
    config: DSAConfig
    text: Text
    offloaded: bool = False


@dataclass(frozen=True)
class Remedy:
    """A change that makes a plan fit.

    Attributes:
        options: as they are given to the command.
        total: bytes that it then takes.
        fits: whether that is little enough; the best that is known, where it is not.
    """

    options: tuple[str, ...]
    total: int
    fits: bool


class Total(Protocol):
    """Bytes that something takes at its peak."""

    def __call__(self, asked: Asked) -> int: ...


def first_remedy(asked: Asked, available: int, total: Total) -> Remedy:
    """The first change after which `total` is at most `available`; where none alone suffices, as few as do, in order.

    First what gives the same result (a smaller batch, weights or activations on the disk), then what gives another
    one: numbers of 16 bits, less text, an allocation that needs no trying, blocks trained one at a time, targets of
    the model's own.
    Steps of one kind are taken as far as needed and no further.
    """
    together, options, least = asked, {}, Remedy((), total(asked), False)
    for make in _KINDS:
        for option, changed in make(asked):
            if (size := total(changed)) <= available:
                return Remedy((option,), size, True)
    for name, make in enumerate(_KINDS):
        before = together
        for option, changed in make(before):
            size = total(changed)
            if size < least.total:
                together, options[name] = changed, option
                least = Remedy(tuple(options.values()), size, size <= available)
            if least.fits:
                return least
    return least


def _batch(asked: Asked) -> Iterator[tuple[str, Asked]]:
    size = asked.text.batch
    while size > 1:
        size //= 2
        yield f"--batch-size {size}", replace(asked, text=replace(asked.text, batch=size))


def _disk(asked: Asked) -> Iterator[tuple[str, Asked]]:
    # Of an offloaded model one block is there at a time.
    if not asked.offloaded and asked.config.reconstruct.is_by_block:
        yield "--device-map disk", replace(asked, offloaded=True)


def _spill(asked: Asked) -> Iterator[tuple[str, Asked]]:
    if asked.config.activations == "memory":
        yield "--activations disk", replace(asked, config=replace(asked.config, activations="disk"))


def _bits(asked: Asked) -> Iterator[tuple[str, Asked]]:
    if asked.shape.itemsize > 2:
        yield "--dtype bfloat16", replace(asked, shape=in_dtype(asked.shape, 2))


def _samples(asked: Asked) -> Iterator[tuple[str, Asked]]:
    number = asked.text.samples
    while number > 8:  # fewer say too little of what a matrix is given
        number = max(number // 2, 8)
        yield f"--num-samples {number}", replace(asked, text=replace(asked.text, samples=number))


def _length(asked: Asked) -> Iterator[tuple[str, Asked]]:
    length = asked.text.length
    while length > 128:
        length = max(length // 2, 128)
        yield f"--sequence-length {length}", replace(asked, text=replace(asked.text, length=length))


def _targets(asked: Asked) -> Iterator[tuple[str, Asked]]:
    if asked.config.update.targets == "dense":
        update = replace(asked.config.update, targets="sparse", residual=False)
        yield "--targets sparse", replace(asked, config=replace(asked.config, update=update))


def _span(asked: Asked) -> Iterator[tuple[str, Asked]]:
    if asked.config.reconstruct.span > 1:
        alone = replace(asked.config.reconstruct, span=1)
        yield "--span 1", replace(asked, config=replace(asked.config, reconstruct=alone))


def _distill(asked: Asked) -> Iterator[tuple[str, Asked]]:
    if asked.config.reconstruct.distill:
        blocks = replace(asked.config.reconstruct, distill=0)
        yield "--distill 0", replace(asked, config=replace(asked.config, reconstruct=blocks))


def _named(asked: Asked) -> Iterator[tuple[str, Asked]]:
    if asked.config.allocation == AUTO:
        settled = last(asked.config)
        yield f"--allocation {settled.allocation}", replace(asked, config=settled)


# In this order: what changes nothing of the result comes first.
_KINDS: tuple[Callable[[Asked], Iterator[tuple[str, Asked]]], ...] = (
    _batch,
    _disk,
    _spill,
    _bits,
    _samples,
    _length,
    _named,
    _distill,
    _span,
    _disk,  # which it may have stood in the way of
    _targets,
)
