"""A Trainer's checkpoint of a sharded model read by a whole one, and the other way round.

Both hold the weights as safetensors. What the optimizer knows is `optimizer.pt` by number of the parameter for a whole
model, and `optimizer.bin` by its name for one that FSDP has sharded, which reads its weights from a third file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..common.files import read_json
from .processes import from_first, shared_folder


WHOLE, SHARDED = "optimizer.pt", "optimizer.bin"
WEIGHTS = "pytorch_model_fsdp.bin"


@contextmanager
def readable(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> Iterator[Path]:
    """A folder with what is in `checkpoint`, as a Trainer reads it that shards `model`, or does not.

    Args:
        model (`nn.Module`): what is trained, whole.
        optimizer (`Optimizer`): of its parameters, in the order in which a Trainer has them.

    Raises:
        ValueError: the best model so far is known to a Trainer of the other kind alone.
    """
    if (checkpoint / WEIGHTS).is_file() == sharded:
        yield checkpoint
        return
    if sharded and read_json(checkpoint / "trainer_state.json").get("best_model_checkpoint"):
        raise ValueError(
            f"{checkpoint} is of a run with patience on whole models, whose best model so far FSDP cannot bring back; "
            "go on without sharding."
        )
    with shared_folder() as folder:
        from_first(lambda: _fill(folder, checkpoint, model, optimizer, sharded))
        yield folder


def _fill(folder: Path, checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> None:
    for path in checkpoint.iterdir():
        if path.name not in (WHOLE, SHARDED, WEIGHTS):
            (folder / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    known = torch.load(checkpoint / (WHOLE if sharded else SHARDED), map_location="cpu", weights_only=True)
    if sharded:
        torch.save(_by_name(known, groups), folder / SHARDED)
        torch.save(_weights(checkpoint, model), folder / WEIGHTS)
    else:
        torch.save(_by_number(known, groups), folder / WHOLE)


def _by_number(known: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state by number of the parameter, from that by name; numbers run through the `groups`."""
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    state = {numbers[name]: found for name, found in known["state"].items()}
    settings = zip(known["param_groups"], groups)
    return {
        "state": dict(sorted(state.items())),
        "param_groups": [{**group, "params": [numbers[name] for name in names]} for group, names in settings],
    }


def _by_name(known: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """`_by_number` backwards."""
    names = [name for group in groups for name in group]
    settings = zip(known["param_groups"], groups)
    return {
        "state": {names[number]: found for number, found in known["state"].items()},
        "param_groups": [{**group, "params": named} for group, named in settings],
    }


def _weights(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """What FSDP loads: all weights and buffers by name, or where an adapter is trained its weights."""
    if hasattr(model, "get_base_model"):  # a PEFT model
        model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)
        return {name: value.detach().cpu() for name, value in model.named_parameters() if value.requires_grad}
    stored: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        if not file.name.startswith("dsa_"):
            stored |= load_file(file)
    # A tied weight is stored once, and wanted under each of its names.
    first: dict[int, str] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        if name in stored:
            first.setdefault(id(value), name)
    ties = {name: first.get(id(value), name) for name, value in model.named_parameters(remove_duplicate=False)}
    return {name: stored[ties.get(name, name)] for name in model.state_dict()}
