"""What a `config.json` may ask for: no more than the weights beside it can fill.

A configuration is a few hundred bytes that anybody can write, and a model of any size is made from it before a single
weight is read: what a checkpoint lacks is filled with random numbers. So its numbers are held against the headers of
the weights, and the making of the model is stopped where it goes beyond them.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules import module as registration

from .shards import open_shard, packed_headers


LAYERS = 1000  # so many are always allowed: a configuration also counts layers that a model does not have
UNKNOWN_LAYERS = 2**14  # where the weights cannot be counted
LABELS = 2**16
COPIES = 5  # weights that are shared are stored once, and stand in a new model up to four times until they are tied
SPARE = 2**20  # parameters that a checkpoint may lack
# What a model's blocks are counted by: num_hidden_layers, n_layer, depths, num_layers_per_stack. Other names speak of
# layers and are as large as they like: vocab_size_per_layer_input, num_depth_bins.
COUNTS_LAYERS = re.compile(r"(?:.*_)?(?:layers|depths?)(?:_per_\w+)?|n_layer")
NAMED_BY_USERS = ("label2id", "task_specific_params")  # sections whose keys are words, not settings of a model
BUFFER_BYTES = 2**30  # tables and masks, which no checkpoint holds


@dataclass(frozen=True)
class Contents:
    """What the headers of a checkpoint's weights say.

    Attributes:
        tensors (`int`): how many there are.
        weights (`int`, *optional*): numbers in them, zeros included; `None` where they are quantised, and stand for
            more than they are.
        widest (`int`): the largest dimension of any.
        whole (`str`, *optional*): a matrix of whole numbers, of which only a quantiser's scales make weights.
    """

    tensors: int
    weights: int | None
    widest: int
    whole: str | None = None


def read_contents(paths: Iterable[str | Path]) -> Contents:
    """The contents of safetensors files, dense or compressed; nothing but headers is read."""
    shapes, whole = [], None
    for path in paths:
        packed = packed_headers(path)
        shapes += [header.shape for header in packed.values()]
        with open_shard(path, "np") as file:
            for name in (name for name in file.keys() if name not in packed):  # noqa: SIM118
                part = file.get_slice(name)
                shapes.append(tuple(part.get_shape()))
                if name.endswith("weight") and len(shapes[-1]) > 1 and part.get_dtype()[0] in "IU":
                    whole = whole or f"{name} ({part.get_dtype()})"
    widest = max((max(shape) for shape in shapes if shape), default=0)
    return Contents(len(shapes), sum(math.prod(shape) for shape in shapes), widest, whole)


def check_counts(config: Any, contents: Contents | None, where: str | Path) -> None:
    """Raise `ValueError` where a `config.json` counts more layers or labels than its checkpoint can have.

    For each of them transformers makes an entry of a list before it makes a model, in memory that nothing bounds.
    """
    most_layers = UNKNOWN_LAYERS if contents is None else max(LAYERS, contents.tensors)
    most_labels = LABELS if contents is None else max(LABELS, contents.widest)
    for name, value in _integers(config):
        counts_layers = COUNTS_LAYERS.fullmatch(name)
        most = most_layers if counts_layers else most_labels if "num_labels" in name else math.inf
        if value > most:
            has = "" if contents is None else f", and the checkpoint has {contents.tensors:,} tensors"
            raise ValueError(
                f"The config.json of {where} says {name}={value:,}{has}: at most {most:,} are read. They do not "
                "belong together; download the checkpoint again, or correct its config.json."
            )


def _integers(config: Any) -> Iterator[tuple[str, int]]:
    """Name and value of every whole number in a `config.json`, however deep; those of a list have the list's name."""
    waiting = [("", config)]
    while waiting:
        name, value = waiting.pop()
        if name in NAMED_BY_USERS:
            continue
        if isinstance(value, Mapping):
            waiting += [(str(key).lower(), part) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(name, part) for part in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, value


@contextmanager
def within(contents: Contents | None, where: str | Path) -> Iterator[None]:
    """A context in which a model is made, by this thread; `ValueError` as soon as it is larger than its checkpoint.

    It counts what modules register, which is the same for all architectures, and costs no second model.
    """
    if contents is None:
        yield
        return
    # The hooks are of the whole process: another thread may make a model of its own meanwhile.
    thread, counted = threading.get_ident(), {"parameters": 0, "numbers": 0, "modules": 0, "bytes": 0}
    pieces = 30 * contents.tensors + 2000  # experts may be one tensor on disk and many modules
    most = {
        "parameters": pieces,
        "modules": pieces,
        "numbers": math.inf if contents.weights is None else COPIES * contents.weights + SPARE,
        "bytes": BUFFER_BYTES + 4 * (contents.weights or 0),
    }

    def count(**more: int) -> None:
        for name, number in more.items():
            counted[name] += number
            if counted[name] > most[name]:
                weights = "" if contents.weights is None else f"{contents.weights:,} weights in "
                asked = {"numbers": "parameters", "parameters": "tensors", "bytes": "bytes of buffers"}.get(name, name)
                raise ValueError(
                    f"The config.json of {where} asks for {counted[name]:,} {asked} or more, and the checkpoint has "
                    f"{weights}{contents.tensors:,} tensors; they do not belong together. Download the checkpoint "
                    "again, or correct its config.json."
                )

    seen: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

    def is_new(module: nn.Module, name: str, value: Any) -> bool:
        known = seen.setdefault(module, set())
        if value is None or name in known or threading.get_ident() != thread:
            return False
        # What is registered again under its name, as when it is tied, takes the place of what was there.
        known.add(name)
        return True

    def parameter(module, name, value):
        if is_new(module, name, value):
            count(parameters=1, numbers=value.numel())

    def buffer(module, name, value):
        if is_new(module, name, value):
            count(bytes=value.numel() * value.element_size())

    def part(module, name, value):
        if is_new(module, name, value):
            count(modules=1)

    hooks = [
        registration.register_module_parameter_registration_hook(parameter),
        registration.register_module_buffer_registration_hook(buffer),
        registration.register_module_module_registration_hook(part),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
