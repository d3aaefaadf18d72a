"""Weights that accelerate keeps elsewhere (CPU or disk): brought in for one block, written back when it is done."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.hooks import AlignDevicesHook
from safetensors.torch import save_file
from torch import Tensor, nn

from ..common.fences import (
    check_unhooked,
    file_behind,
    hooks_of,
    in_memory,
    is_on_disk,
    knows,
    plain_store,
    point_to,
    scratch_folder,
    tied_names,
    weights_behind,
)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of the model's weights live outside its modules."""
    return any(_offloading_hook(module) is not None for module in model.modules())


@contextmanager
def resident(model: nn.Module, names: Sequence[str]) -> Iterator[set[str]]:
    """The named modules with all their weights on their execution device, loaded once while the context is open.

    Yields a set: whoever changes a parameter, in place or for one of another shape, adds its full name, and on leaving
    it is written back to where it came from, under every name that it is tied to. What came from a file is written to
    a new one; a checkpoint is never touched. Modules that are not offloaded are left as they are.
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
            # What accelerate does before a forward pass: the weights come to the execution device.
            hook.pre_forward(module)
            hook.offload = False  # from here on the hook moves inputs only
            loaded.append((module, hook))
        for name in names:
            for path, module in model.get_submodule(name).named_modules(prefix=name):
                check_unhooked(module, path)
        # Nothing is written back after an error: what is stored stays as it was.
        yield changes
        for name in changes:
            value = _tensor(model, name)
            for shared in _names_of(model, name):
                _write_back(model, shared, value)
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, None)


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights are `resident`; what moves them is shared, and so is all that is elsewhere."""
    hooks = [hook for part in module.modules() for hook in hooks_of(part)]
    return copy.deepcopy(module, {id(hook): hook for hook in hooks})


def read_from(model: nn.Module, name: str, file: Path, dtype: str) -> bool:
    """Have `name`, kept on the disk, be read from a safetensors file from now on; whether it is kept there.

    Args:
        name: full name of the parameter, and what it is called in the file.
        dtype: as torch calls it: "bfloat16", ...
    """
    stores = [_plain_store(model, shared) for shared in _names_of(model, name)]
    if not all(store is not None and knows(store, key) for store, key in stores):
        return False
    for store, key in stores:
        point_to(store, key, file, dtype, name)
    return True


def lies_in(model: nn.Module, name: str) -> tuple[Path, str] | None:
    """The file that the parameter or buffer `name` is read from, and its name there; `None` where it is elsewhere."""
    store, key = _plain_store(model, name)
    found = file_behind(store, key) if is_on_disk(store) else None
    return None if found is None else (Path(found[0]), found[1])


def _plain_store(model: nn.Module, name: str) -> tuple[Mapping[str, Tensor] | None, str]:
    """As `_store`, the map itself under whatever is around it."""
    store, key = _store(model, name)
    return (None, key) if store is None else plain_store(store, key)


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    return next((hook for hook in hooks_of(module) if hook.offload), None)


def _names_of(model: nn.Module, name: str) -> set[str]:
    """All full names of the parameter `name`: tied parameters are one to the model, but stored once per name."""
    source_of = tied_names(model)
    source = source_of.get(name, name)
    return {name, source} | {target for target, other in source_of.items() if other == source}


def _write_back(model: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter `name`, of any shape, wherever it lives: in a map, on disk, or in its module."""
    store, key = _plain_store(model, name)
    if store is None:
        tensor = _tensor(model, name)
        # Tied parameters that are here share their memory, and have the value already.
        if tensor.data_ptr() != value.data_ptr():
            tensor.copy_(value)
        return
    here = in_memory(store)
    if key in here and here[key].shape == value.shape:
        here[key].copy_(value)
        return
    if key in here:
        here[key] = value.to(here[key].device, copy=True)
        return
    # Offloaded to disk, or read from the checkpoint itself.
    file = Path(scratch_folder(store), f"{key}.safetensors")
    save_file({key: value.detach().cpu().contiguous()}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)  # never written over: an earlier version may be mapped into memory
    point_to(store, key, file, str(value.dtype).removeprefix("torch."))


def _tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this full name, as it is now."""
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute).data


def _store(model: nn.Module, name: str) -> tuple[Mapping[str, Tensor] | None, str]:
    """The map (name -> weight of any shape) that the parameter `name` is loaded from, its key; `None` if it is not."""
    owner, _, key = name.rpartition(".")
    while True:
        # A hook further out may place the weights of all modules inside it, under longer keys.
        for hook in hooks_of(model.get_submodule(owner)):
            if (store := weights_behind(hook, key)) is not None:
                return store, key
        if not owner:
            return None, key
        owner, _, part = owner.rpartition(".")
        key = f"{part}.{key}"
