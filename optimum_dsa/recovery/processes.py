"""One recovery on several processes: what each of them is told, and who writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback

from ..common.devices import own_device, process_state, use_cpu
from ..common.launched import process_count
from ..model.adapters import inner_model
from ..model.architecture import find_architecture
from ..model.sharded import copy_into
from .configuration import RecoveryConfig


Made = TypeVar("Made")


def is_first() -> bool:
    """Whether this process writes; the only one there is does."""
    return process_count() == 1 or process_state().is_main_process


def begin_together(model: nn.Module) -> None:
    """Have the processes talk to each other.

    Raises:
        ValueError: `model` is not on the device of its process, through which it would talk.
    """
    if process_count() == 1:
        return
    device = next(model.parameters()).device
    if (device.type == "cpu") != use_cpu():
        raise ValueError(
            f"The model is on {device}, and this process works on {own_device()}; load it there: "
            "device_map=optimum_dsa.own_device()."
        )
    process_state()


def from_first(make: Callable[[], Made]) -> Made:
    """What `make` gives in the first process, in every process; what it raises there is raised in each of them."""
    if process_count() == 1:
        return make()
    given: list = [None, None]
    if is_first():
        try:
            given[0] = make()
        except Exception as error:  # whoever waits for the first has to hear of it
            given[1] = error
    made, error = broadcast_object_list(given)
    if error is not None:
        raise error
    return made


def wait_for_all() -> None:
    """Return when every process is here."""
    if process_count() > 1:
        process_state().wait_for_everyone()


@contextmanager
def environment_kept() -> Iterator[None]:
    """Forget what accelerate writes into the environment: that FSDP is on, which the next Trainer would read there."""
    ours = ("ACCELERATE_", "FSDP_")
    before = {name: value for name, value in os.environ.items() if name.startswith(ours)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(ours)]:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder that all processes see, removed at the end; all are to be here again by then."""
    folder = from_first(lambda: Path(tempfile.mkdtemp(prefix="optimum-dsa-")))
    try:
        yield folder
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)


def check_divided(config: RecoveryConfig, windows: int | None = None) -> None:
    """Raise `ValueError` where processes cannot divide the work so that it is the work of one.

    Args:
        windows (`int`, *optional*): how many windows there are to train on; `None` where nobody knows yet.
    """
    number = process_count()
    if config.sharding != "none" and number == 1:
        raise ValueError(
            f"sharding={config.sharding!r} divides the model over processes, and there is one; start several with "
            "torchrun, or leave it out."
        )
    if config.batch_size % number:
        raise ValueError(
            f"batch_size={config.batch_size} is divided over the processes, and {number} of them do not divide it; "
            f"give a multiple of {number}, or another number of processes."
        )
    if windows is not None and number > 1 and windows < config.batch_size:
        raise ValueError(
            f"There are {windows} windows to train on and {config.batch_size} in a batch, which {number} processes "
            "divide; give more text, or a smaller batch_size."
        )


def check_ties(model: nn.Module) -> None:
    """Raise `ValueError` for a parameter with several places that FSDP cannot put into one group.

    Those of the embedding and the head accelerate puts together; other ties, as of an encoder and a decoder, it parts.
    """
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not any(module is end for end in ends):
                places.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    known = {id(parameter) for end in ends for parameter in end.parameters()}
    for parameter, names in places.items():
        if len(names) + (parameter in known) > 1:
            raise ValueError(
                f"{names[0]} is tied to another parameter than the embedding to its head, which FSDP cannot divide; "
                "leave sharding out: each process holds the whole model then."
            )


def fsdp_settings(model: nn.Module) -> dict[str, Any]:
    """What transformers is to know of FSDP for `model`: that blocks are what is sharded, and brought together.

    By itself it takes what the model says not to split over devices, embeddings among them, which it ties later.
    """
    inner = inner_model(model)
    blocks = (block for stack in find_architecture(inner, skip_unprunable=True).stacks for block in stack.blocks)
    kinds = dict.fromkeys(type(inner.get_submodule(block.name)).__name__ for block in blocks)
    return {"version": 2, "transformer_layer_cls_to_wrap": list(kinds)}


class SetAside(TrainerCallback):
    """Keeps the model that shares were made of in the memory of the CPU while these are trained."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.devices = {name: parameter.device for name, parameter in model.named_parameters()}

    def on_train_begin(self, args, state, control, **kwargs):
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to("cpu")

    def bring_back(self, trained: nn.Module | None = None) -> None:
        """Have the model where it was, with the weights of the sharded one that was `trained`, where there is one."""
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self.devices[name])
        if trained is not None:
            copy_into(self.model, trained)
