"""Weights that accelerate keeps elsewhere (CPU or disk): brought in for one block, written back when it is done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.hooks import AlignDevicesHook, SequentialHook
from safetensors.torch import save_file
from torch import Tensor, nn


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of the model's weights live outside its modules."""
    return any(_offloading_hook(module) is not None for module in model.modules())


@contextmanager
def resident(model: nn.Module, names: Sequence[str]) -> Iterator[set[str]]:
    """The named modules with all their weights on their execution device, loaded once while the context is open.

    Yields a set: whoever changes a parameter in place adds its full name, and on leaving it is written back to where it
    came from. Weights that came from a checkpoint file are written beside the offloaded ones; the checkpoint itself is
    never touched. Modules that are not offloaded are left as they are.
    """
    hooked = [
        (f"{name}.{path}" if path else name, module, hook)
        for name in names
        for path, module in model.get_submodule(name).named_modules()
        if (hook := _offloading_hook(module)) is not None
    ]
    changes: set[str] = set()
    loaded = []
    try:
        for _, module, hook in hooked:
            hook.pre_forward(module)
            hook.offload = False  # from here on the hook moves inputs only
            loaded.append((module, hook))
        yield changes
        for path, module, hook in hooked:
            for name, parameter in module.named_parameters(recurse=hook.place_submodules):
                if f"{path}.{name}" in changes:
                    _write_back(hook, name, parameter.data)
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, None)


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


def _write_back(hook: AlignDevicesHook, name: str, value: Tensor) -> None:
    """Replace the stored weight `name` of the hook's module by `value`."""
    store, key = hook.weights_map, name
    if hasattr(store, "prefix"):
        store, key = store.dataset, store.prefix + name
    in_memory = getattr(store, "state_dict", store)
    if key in in_memory:
        in_memory[key].copy_(value)
        return
    folder = Path(store.save_folder or _scratch_folder(store))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{key}.pruned.safetensors"
    save_file({key: value.detach().cpu().contiguous()}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)  # never written over: an earlier version may be mapped into memory
    store.index[key] = {
        "safetensors_file": str(file),
        "weight_name": key,
        "dtype": str(value.dtype).removeprefix("torch."),
    }


def _scratch_folder(store) -> str:
    """A temporary folder that lives as long as the offloaded model."""
    if not hasattr(store, "_dsa_scratch"):
        store._dsa_scratch = tempfile.TemporaryDirectory(prefix="optimum-dsa-")
    return store._dsa_scratch.name
