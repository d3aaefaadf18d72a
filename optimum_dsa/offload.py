"""Weights that accelerate keeps elsewhere (CPU or disk): brought in for one block, written back when it is done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file
from torch import Tensor, nn


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of the model's weights live outside its modules."""
    return any(_offloading_hook(module) is not None for module in model.modules())


@contextmanager
def resident(model: nn.Module, names: Sequence[str]) -> Iterator[set[str]]:
    """The named modules with all their weights on their execution device, loaded once while the context is open.

    Yields a set: whoever changes a parameter in place adds its full name, and on leaving it is written back to where
    it came from, under every name that it is tied to. What came from a file is written to a new one; a checkpoint is
    never touched. Modules that are not offloaded are left as they are.
    """
    hooked = [
        (module, hook)
        for name in names
        for module in model.get_submodule(name).modules()
        if (hook := _offloading_hook(module)) is not None
    ]
    changes: set[str] = set()
    loaded = []
    try:
        for module, hook in hooked:
            hook.pre_forward(module)
            hook.offload = False  # from here on the hook moves inputs only
            loaded.append((module, hook))
        yield changes
        for name in changes:
            value = model.get_parameter(name).data
            for shared in _names_of(model, name):
                _write_back(model, shared, value)
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, None)


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    return next((hook for hook in _hooks(module) if hook.offload), None)


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def _names_of(model: nn.Module, name: str) -> set[str]:
    """All full names of the parameter `name`: tied parameters are one to the model, but stored once per name."""
    source_of = getattr(model, "all_tied_weights_keys", None) or {}
    source = source_of.get(name, name)
    return {name, source} | {target for target, other in source_of.items() if other == source}


def _write_back(model: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter `name`, wherever that lives: in a map of weights, on disk, or in its module."""
    store, key = _store(model, name)
    if store is None:
        parameter = model.get_parameter(name).data
        if parameter.data_ptr() != value.data_ptr():
            parameter.copy_(value)
        return
    if hasattr(store, "prefix"):
        store, key = store.dataset, store.prefix + key
    in_memory = getattr(store, "state_dict", store)
    if key in in_memory:
        in_memory[key].copy_(value)
        return
    file = Path(_scratch_folder(store), f"{key}.safetensors")
    save_file({key: value.detach().cpu().contiguous()}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)  # never written over: an earlier version may be mapped into memory
    store.index[key] = {
        "safetensors_file": str(file),
        "weight_name": key,
        "dtype": str(value.dtype).removeprefix("torch."),
    }


def _store(model: nn.Module, name: str) -> tuple[Mapping[str, Tensor] | None, str]:
    """The map of weights from which the parameter `name` is loaded, and its key there; `None` if it is not."""
    owner, _, key = name.rpartition(".")
    while True:
        for hook in _hooks(model.get_submodule(owner)):
            if hook.weights_map is not None and (hook.place_submodules or "." not in key):
                return hook.weights_map, key
        if not owner:
            return None, key
        owner, _, part = owner.rpartition(".")
        key = f"{part}.{key}"


def _scratch_folder(store: OffloadedWeightsLoader) -> str:
    """A folder, inside the offload folder if there is one, that belongs to one offloaded model and lives as long."""
    if not hasattr(store, "_dsa_scratch"):
        store._dsa_scratch = tempfile.TemporaryDirectory(prefix="optimum-dsa-", dir=store.save_folder)
    return store._dsa_scratch.name
