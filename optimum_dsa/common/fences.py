"""Every place where a dependency is touched beyond its documented API: guarded, explained, and held against releases.

No other module reads a private attribute of a dependency; `tests/common/test_fences.py` looks. A row of `FENCES` says
what is touched and why, the page "Dependencies" shows the rows, and tests marked `contract` hold them against the
oldest and the newest releases.
"""

from __future__ import annotations

import tempfile
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .fence_rows import FENCES, DependencyError, version_of


def tensor_version(tensor: Tensor) -> int:
    """A number that grows whenever the tensor, of any shape, is changed in place."""
    return _get(tensor, "_version", "tensor version")


def parameters_in(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """The module's own parameters, of any shape, as the mapping that its attributes are looked up in."""
    return _get(module, "_parameters", "module parameters")


def parts_of(module: nn.Module) -> tuple[MutableMapping[str, Any], ...]:
    """The module's own parameters, buffers and modules by name, each as the mapping that attributes are looked up in.

    What is `None` is in it as well, and what has two names stands under both.
    """
    return tuple(_get(module, name, "module parts") for name in ("_parameters", "_buffers", "_modules"))


def class_before_sharding(module: nn.Module) -> type:
    """The class that a module had before FSDP2 gave it one of its own."""
    bases = type(module).__bases__
    is_made = len(bases) == 2 and bases[0].__name__ == "FSDPModule"
    return bases[1] if is_made else type(module)


def hooks_of(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module that move its weights or inputs (`AlignDevicesHook`), the outermost first."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    found = [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]
    for hook in found:
        for name in ("offload", "weights_map", "place_submodules"):
            _get(hook, name, "hook state")
    return found


def move_hooks(module: nn.Module, other: nn.Module) -> None:
    """Put accelerate's hooks on `module` on `other`, which takes its place."""
    from accelerate.hooks import add_hook_to_module

    for hook in hooks_of(module):
        add_hook_to_module(other, hook, append=True)


def weights_from(module: nn.Module, weights: Mapping[str, Tensor], device: Any) -> None:
    """Have accelerate take the module's own weights, of any shape, from a map to `device` whenever they are needed."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(module, AlignDevicesHook(device, offload=True, weights_map=weights))


def weights_behind(hook: Any, key: str) -> Any:
    """The map from which a hook on a module loads its parameter `key`, `None` if it does not."""
    return hook.weights_map if hook.place_submodules or "." not in key else None


def is_placed(model: nn.Module) -> bool:
    """Whether accelerate moves the model's inputs to where they are needed."""
    return has_device_map(model) or hasattr(model, "_hf_hook")


def has_device_map(model: nn.Module) -> bool:
    """Whether the model was spread by a device map."""
    return hasattr(model, "hf_device_map")


def device_map_of(model: nn.Module) -> Mapping[str, Any]:
    """Which module of the model is where, by the device map that it was spread by; empty where there was none."""
    return model.hf_device_map if has_device_map(model) else {}


@contextmanager
def saved_by_shards(model: nn.Module) -> Iterator[None]:
    """transformers saves the offloaded model a shard at a time, as it does where there is a device map."""
    unmapped = not has_device_map(model)
    if unmapped:
        model.hf_device_map = {"": "cpu"}
    try:
        yield
    finally:
        if unmapped:
            del model.hf_device_map


def has_attached_adapters(model: nn.Module) -> bool:
    """Whether transformers itself put adapters into the model (`add_adapter`), and saves these."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def saved_without_adapters(model: nn.Module) -> Iterator[None]:
    """transformers saves the model itself, and not the adapters that were attached to it (`add_adapter`)."""
    attached = has_attached_adapters(model)
    if attached:
        model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        if attached:
            model._hf_peft_config_loaded = True


def innermost_forward(module: nn.Module) -> str:
    """The name of the attribute that holds the module's own forward: behind accelerate's hook, if there is one."""
    if not hasattr(module, "_hf_hook"):
        return "forward"
    if "_old_forward" not in vars(module):
        raise FENCES["hooked forward"].missing()
    return "_old_forward"


def check_unhooked(module: nn.Module, name: str) -> None:
    """Raise `DependencyError` where weights are not here and no hook says where they are."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        raise DependencyError(
            f"The weights of {name} are on the device 'meta', and no hook of accelerate {version_of('accelerate')} "
            "says where they are; load the model with device_map, or install a release of accelerate that optimum-dsa "
            "was tested with (constraints.txt names one)."
        )


def plain_store(store: Any, key: str) -> tuple[Any, str]:
    """The map of weights under accelerate's prefixes, and the key there."""
    while hasattr(store, "prefix"):
        store, key = _get(store, "dataset", "store"), store.prefix + key
    return store, key


def is_on_disk(store: Any) -> bool:
    """Whether a store is accelerate's of weights on the disk, and no map of values or one that makes them."""
    from accelerate.utils import OffloadedWeightsLoader

    return isinstance(store, OffloadedWeightsLoader)


def in_memory(store: Any) -> Mapping[str, Tensor]:
    """The weights of a store that are kept in memory, of any shape, by name."""
    return store if isinstance(store, dict) else _get(store, "state_dict", "store")


def point_to(store: Any, key: str, file: Path, dtype: str, name: str | None = None) -> None:
    """Have a store read `key` from a safetensors file from now on, in which it is called that, or `name`."""
    entry = {"safetensors_file": str(file), "weight_name": name or key, "dtype": dtype}
    _get(store, "index", "store")[key] = entry


def file_behind(store: Any, key: str) -> tuple[str, str] | None:
    """The safetensors file that a store reads `key` from, and its name there; `None` where it is from elsewhere."""
    entry = {} if key in in_memory(store) else _get(store, "index", "store").get(key, {})
    file = entry.get("safetensors_file")
    return None if file is None else (file, entry.get("weight_name") or key)


def knows(store: Any, key: str) -> bool:
    """Whether a store has `key` on the disk; nothing is read."""
    return not isinstance(store, dict) and key in _get(store, "index", "store") and key not in in_memory(store)


def keeps_names_when_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether transformers writes these tensors of the model, of any shape, under the names and shapes they have.

    No values are needed. `False` on releases that do not tell.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion

        found = revert_weight_conversion(model, {name: tensor.to("meta") for name, tensor in tensors.items()})
        return {name: tensor.shape for name, tensor in found.items()} == shapes
    except Exception:  # noqa: BLE001 - whatever a conversion does with values that are not there
        return False


# What transformers calls of a quantizer while it loads: all that ours overrides. Older releases lack some of them.
_HOOKS = (
    "update_attn_implementation",
    "_process_model_before_weight_loading",
    "update_weight_conversions",
    "get_new_dtype",
    "remove_quantization_config",
    "_process_model_after_weight_loading",
)
_SCRATCH: dict[int, str] = {}


def scratch_folder(store: Any) -> str:
    """A folder, inside the store's own if it has one, that lives as long as the store."""
    if id(store) not in _SCRATCH:
        folder = tempfile.TemporaryDirectory(prefix="optimum-dsa-", dir=_get(store, "save_folder", "store"))
        _SCRATCH[id(store)] = folder.name
        # The store itself reads the files: they go when nobody can read them any more.
        weakref.finalize(store, _forget, id(store), folder)
    return _SCRATCH[id(store)]


def _forget(number: int, folder: tempfile.TemporaryDirectory) -> None:
    del _SCRATCH[number]
    folder.cleanup()


def tied_names(model: nn.Module) -> Mapping[str, str]:
    """Parameter name -> the name of the one that it is tied to."""
    if hasattr(model, "all_tied_weights_keys"):
        return model.all_tied_weights_keys or {}
    # no model of transformers, or one that does not end its construction with `post_init`, which names the ties
    if not hasattr(model, "tie_weights") or hasattr(model, "get_expanded_tied_weights_keys"):
        return {}
    raise FENCES["ties"].missing()


def name_when_loaded(model: nn.Module, known: Collection[str]) -> Callable[[str], str] | None:
    """What transformers calls in `model`, whose tensors are `known`, the one that has a name in its checkpoint.

    `None` on releases that do not tell.
    """
    prefix = getattr(model, "base_model_prefix", None) or None
    names = dict.fromkeys(known, True)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        steps = get_model_conversion_mapping(model)
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        rename_source_key("", renamings, converters, prefix, names)
    except (ImportError, TypeError, AttributeError):
        return None

    def loaded(name: str) -> str:
        found, _ = rename_source_key(name, renamings, converters, prefix, names)
        if found not in names and name in names:
            # as transformers does: what is there under its own name was not to be renamed
            found, _ = rename_source_key(name, [], [], prefix, names)
        return found

    return loaded


@contextmanager
def one_expert_at_a_time(module: nn.Module) -> Iterator[None]:
    """The experts' own loop instead of a fused kernel, which shows nobody what each expert is given."""
    config = getattr(module, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    if chosen in (None, "eager"):
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = chosen


def experts_matrices(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that hold the matrices of a module's experts, if transformers computes with any of them.

    Such a class takes its product from a registry of implementations, so that what it computes is known.
    """
    if not all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed")):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def in_parallel(module: nn.Module) -> bool:
    """Whether other processes hold others of the experts of a module."""
    return bool(getattr(module, "_is_expert_parallel", False))


def gated(module: nn.Module, both: Tensor) -> Tensor:
    """What a module of experts makes of (n, 2 · width) numbers of gate and map: (n, width)."""
    return _get(module, "_apply_gate", "fused experts")(both)


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make `module` one of a `kind` with another forward, in place; accelerate's hooks on it stay."""
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hooks = hooks_of(module)
    if hooks:
        remove_hook_from_module(module)
        vars(module).pop("forward", None)  # the one of the class before, which a hook has put there
    module.__class__ = kind
    for hook in hooks:
        add_hook_to_module(module, hook, append=True)


def insert_callback(trainer: Any, callback: Any) -> None:
    """Add a callback to a Trainer before all others."""
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", None)
    if isinstance(callbacks, list):
        callbacks.insert(0, callback)
    else:
        trainer.add_callback(callback)


def add_peft_type(name: str) -> None:
    """Add a member to PEFT's enumeration of methods."""
    from peft.utils.peft_types import PeftType

    if name in PeftType.__members__:
        return
    try:
        # An enumeration with members cannot be subclassed, and PEFT looks methods up in this very one.
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType._member_names_)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    except (AttributeError, TypeError):
        raise FENCES["methods"].missing() from None


def use_lora_layer(config: Any, kind: type[nn.Module], layer: type[nn.Module]) -> None:
    """Have PEFT put `layer` around modules of a `kind` that it does not know, where a LoRA of `config` is put on."""
    _get(config, "_register_custom_module", "custom layers")({kind: layer})


def check_adapter_arguments(layer: Any, x: Tensor, *args, **kwargs) -> None:
    """What PEFT asks of the arguments of a LoRA layer, x (..., in_features) first."""
    _get(layer, "_check_forward_args", "layer")(x, *args, **kwargs)


def transport_error() -> type[Exception]:
    """What the Hub's client raises when no answer comes: httpx's, by whichever name it is installed."""
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__bases__[0]
    return base if issubclass(base, Exception) else OSError


def check_compressed_loading() -> None:
    """Raise `DependencyError` on releases of transformers that lack what loading compressed checkpoints needs."""
    from transformers import __version__
    from transformers.quantizers.base import HfQuantizer

    absent = [name for name in _HOOKS if not hasattr(HfQuantizer, name)]
    if absent:
        raise DependencyError(
            "Compressed checkpoints load with transformers 5.21 or newer (constraints.txt names the tested one), and "
            f"this is {__version__}, without {', '.join(absent)}; install another, or store the folder dense with "
            "`optimum-cli dsa convert FOLDER DENSE --to dense`."
        )


def add_loading_options(config: type) -> None:
    """Have transformers take over loading options of a `quantization_config` of this class that a caller passes.

    On releases that keep no such list, the checkpoint's own says what is loaded, and transformers warns of it.
    """
    from transformers.quantizers import auto

    known = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)
    if isinstance(known, tuple) and config not in known:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, config)
        # It says that the checkpoint's own is used, and means the rest of it.
        warnings.filterwarnings("ignore", r"(?s)You passed `quantization_config`.*\['run_packed'\]")


def _get(owner: Any, name: str, row: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        raise FENCES[row].missing() from None
