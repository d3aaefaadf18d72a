"""Models of transformers' families whose layers have widths of their own. This file is all that they need.

It lies beside the weights of such a model, and loads them with `trust_remote_code=True`; where optimum-dsa is
imported, it is that package's own file that does. Classes are made of transformers' own when they are asked for:
`PerLayerLlamaForCausalLM` is `LlamaForCausalLM`, and `PerLayerLlamaConfig` is `LlamaConfig`, with

    per_layer_config   layer -> the settings in which it differs, under the names of its family (intermediate_size,
                       num_attention_heads, num_key_value_heads, ...), as transformers itself writes and reads them
    per_layer_blocks   the name of the list of layers in the whole model, such as "model.layers"
    per_layer_tensors  tensor of a layer -> [setting, n, axis]: along `axis`, n fewer for each one that is missing
    per_layer_heads    layer -> which of the whole model's heads it has, where that gives each of them a slope (ALiBi)
    per_layer_absent   setting -> [module, matrix, values]: a layer in which it is 0 runs without that module, see
                       `leave_out`

A model is made with the settings that all layers share, and what is too wide in a layer is cut before weights are
loaded. Caches of unequal numbers of heads are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.pytorch_utils import Conv1D


PREFIX, TYPE = "PerLayer", "dsa_"  # of the names of classes, and of `model_type`

# What modules and configurations call what is cut: query heads, heads of keys and values, and the width of all heads.
QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("all_head_size", "split_size", "inner_dim")
# What layers are given that may have a row for each head: slopes (ALiBi), alone or in a mask.
HEAD_ROWS = ("alibi", "position_bias", "attention_mask")
# What they call the number of experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
EXPERT_COUNTS += ("n_experts",)


class PerLayerConfig:
    """Of a configuration: its layers may differ."""


class PerLayerModel:
    """Of a model: every layer is as wide as its own settings say."""

    def __init__(self, config: Any, *args, **kwargs):
        # The plain class is made of what all layers share: it would ask for one number for all.
        with shared(config) as widths:
            super().__init__(config, *args, **kwargs)
            narrow(self, config, widths)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs) -> Any:
        """As of every class; `ValueError` with a name where weights have other widths than the settings say."""
        # Asked to look over them, it says which they are; else it only says that there are some.
        model, told = super().from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        if told["mismatched_keys"] and not ignore_mismatched_sizes:
            name, stored, said = min(told["mismatched_keys"])
            raise ValueError(
                f"{name} is {tuple(stored)} in the checkpoint, and by the per_layer_config of its config.json it is "
                f"{tuple(said)}: they do not belong together."
            )
        return (model, told) if output_loading_info else model


class OwnSettings:
    """A configuration of which some numbers are a layer's own; all else is asked of the whole model's."""

    def __init__(self, whole: Any, numbers: Mapping[str, int]):
        vars(self).update(numbers, whole=whole)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "whole" not in vars(self):  # asked while it is copied
            raise AttributeError(name)
        return getattr(self.whole, name)


@contextmanager
def shared(config: Any) -> Iterator[dict[int, dict[str, int]]]:
    """A context in which a configuration has only the settings that all layers share; gives those of each layer."""
    widths = widths_of(config)
    config.per_layer_config = None
    try:
        yield widths
    finally:
        config.per_layer_config = widths or None


def widths_of(config: Any) -> dict[int, dict[str, int]]:
    """Layer -> its own settings, those that are the model's included."""
    names = sorted(config.per_layer_attributes or ())
    return {
        number: {name: getattr(own, name) for name in names}
        for number, own in enumerate(config.per_layer_config if names else ())
    }


def narrow(model: nn.Module, config: Any, widths: Mapping[int, Mapping[str, int]]) -> None:
    """Cut every layer of a model, which has the widths of `config`, to its own; in place, whatever weights it has.

    Raises:
        ValueError: the settings do not fit each other.
    """
    tensors = getattr(config, "per_layer_tensors", {})
    if unknown := {name for own in widths.values() for name in own} - {row[0] for row in tensors.values()}:
        heads = {*QUERY_HEADS, *KEY_HEADS, *EXPERT_COUNTS}
        if unknown - heads:
            raise ValueError(f"per_layer_config has {min(unknown - heads)!r}, and per_layer_tensors no tensor of it.")
    own_settings(model, config)
    blocks = list_of_layers(model, config.per_layer_blocks) if widths else ()
    for number, own in widths.items():
        fewer = {name: getattr(config, name) - value for name, value in own.items()}
        least = {name: int(name in EXPERT_COUNTS) for name in own}
        if wrong := [name for name, value in own.items() if not least[name] <= value <= getattr(config, name)]:
            raise ValueError(
                f"Layer {number} has {wrong[0]}={own[wrong[0]]} in per_layer_config, and the whole model has "
                f"{getattr(config, wrong[0])}: a layer's own is at least {least[wrong[0]]}, and no more than that."
            )
        _cut(blocks[number], tensors, fewer, f"{config.per_layer_blocks}.{number}")
        gone = max((fewer.get(name, 0) for name in EXPERT_COUNTS), default=0)
        count_experts(blocks[number], {name for name, row in tensors.items() if row[0] in EXPERT_COUNTS}, gone)
        of_heads = {name for name, row in tensors.items() if row[0] in QUERY_HEADS + KEY_HEADS}
        if of_heads:
            queries = max((fewer.get(name, 0) for name in QUERY_HEADS), default=0)
            keys = max((fewer.get(name, 0) for name in KEY_HEADS), default=0)
            rows = {name: tensors[name] for name in of_heads if _reads(blocks[number], name, tensors[name][2])}
            width = max((fewer.get(setting, 0) * each for setting, each, _ in rows.values()), default=0)
            count_heads(blocks[number], of_heads, queries, keys, width)
        for setting, absent in (getattr(config, "per_layer_absent", None) or {}).items():
            if own.get(setting) == 0:
                leave_out(blocks[number], *absent)
    for number, kept in kept_heads(config).items():
        total = next(value for name in QUERY_HEADS if isinstance(value := getattr(config, name, None), int))
        own = max((widths[number].get(name, 0) for name in QUERY_HEADS), default=0)
        if len(kept) != own or not all(0 <= head < total for head in kept):
            raise ValueError(
                f"Layer {number} has {own} heads in per_layer_config, and per_layer_heads names {kept} of {total}."
            )
        keep_rows(blocks[number], (name for name, row in tensors.items() if row[0] in QUERY_HEADS), kept, total)


def list_of_layers(model: nn.Module, path: str) -> nn.ModuleList:
    """The layers of a model, or of the model without its head, of which the list has another name."""
    base = getattr(model, "base_model_prefix", "")
    if base and not hasattr(model, base):
        path = path.removeprefix(f"{base}.")
    return model.get_submodule(path)


def _cut(block: nn.Module, tensors: Mapping[str, Any], fewer: Mapping[str, int], called: str) -> None:
    for name, (setting, each, axis) in tensors.items():
        path, _, last = name.rpartition(".")
        module = _part(block, path)
        value, gone = getattr(module, last, None), fewer.get(setting, 0) * each
        if value is None or not gone:
            continue
        if value.shape[axis] < gone:
            raise ValueError(f"{called}.{name} is {tuple(value.shape)}, and by per_layer_config {gone} of them go.")
        kept = value.data.narrow(axis, 0, value.shape[axis] - gone).clone()
        module.register_parameter(last, nn.Parameter(kept, requires_grad=value.requires_grad))
        count_anew(module)


def _reads(block: nn.Module, name: str, axis: int) -> bool:
    """Whether `axis` of a tensor is what its module reads."""
    module = _part(block, name.rpartition(".")[0])
    return module is not None and name.endswith(".weight") and axis == (0 if isinstance(module, Conv1D) else 1)


def _part(block: nn.Module, path: str) -> nn.Module | None:
    """A part of a block by name; `None` where it is of another kind, and lacks it."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def count_anew(module: nn.Module) -> None:
    """Have a module that was cut say how large its matrix is."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def count_heads(block: nn.Module, tensors: Iterable[str], queries: int, keys: int, width: int) -> None:
    """Have the modules around a block's `tensors` say how many heads there are, so many being gone."""
    changes = dict.fromkeys(QUERY_HEADS, queries) | dict.fromkeys(KEY_HEADS, keys) | dict.fromkeys(WIDTHS, width)
    if not keys:  # where one head of keys and values is all query heads', each of these is one of its group
        changes["num_key_value_groups"] = queries
    around = {name.rpartition(".")[0].rpartition(".")[0] for name in tensors}
    around |= {".".join(path[:end]) for path in (name.split(".") for name in around) for end in range(1, len(path))}
    for module in filter(None, (_part(block, path) for path in around - {""})):
        if (config := vars(module).get("config")) is not None:
            module.config = _own(config)
            _lower(module.config, changes)
        _lower(module, changes)


class Absent:
    """Of a module of a layer: there is nothing left in it to run.

    It gives the bias of the matrix that would have read what it makes, or zeros; without such a matrix, what is read
    outside of it: a tensor without a channel. `gives` is (the matrix's module, how many values it returns).
    """

    def forward(self, *args, **kwargs) -> Any:
        path, values = self.gives
        hidden = kwargs.get("hidden_states")
        if hidden is None:
            hidden = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        reader = self.get_submodule(path) if path else None
        width = 0 if reader is None else max(reader.weight.shape)  # the other one is 0
        given = hidden.new_zeros((*hidden.shape[:-1], width))
        if getattr(reader, "bias", None) is not None:
            given = given + reader.bias.to(given)
        return (given, *[None] * (values - 1)) if values else given

    def __reduce_ex__(self, protocol) -> tuple:
        # Its class is made when it is needed, and found by no name.
        return _absent, (type(self).whole,), self.__dict__


def _absent(kind: type) -> Absent:
    """A module of no parts yet, of the class that stands for one of this kind."""
    made = _absent_class(kind)
    return made.__new__(made)


def _absent_class(kind: type) -> type:
    """The class of what is left of a module of this kind, which it names as `whole`."""
    return type(f"Absent{kind.__name__}", (Absent, kind), {"__module__": __name__, "whole": kind})


def leave_out(block: nn.Module, path: str, reader: str, values: int) -> None:
    """Have a module of a block, from which everything is cut that it is made of, give what is left: see `Absent`.

    Args:
        path: its name in the block.
        reader: in it, the name of the module whose matrix reads what it makes; "" where that is outside.
        values: how many it returns, the first of which is its output; 0 where that is all.
    """
    module = block.get_submodule(path)
    if not isinstance(module, Absent):
        module.__class__ = _absent_class(type(module))
    module.gives = (reader, values)


def kept_heads(config: Any) -> dict[int, list[int]]:
    """Layer -> the numbers of its heads among those of the whole model, where these are told."""
    return {int(number): kept for number, kept in (getattr(config, "per_layer_heads", None) or {}).items()}


def keep_rows(block: nn.Module, tensors: Iterable[str], kept: Sequence[int], total: int) -> None:
    """Have what holds a block's `tensors` be given the rows of the heads `kept` alone, of what has `total` rows."""
    for path in {name.rpartition(".")[0].rpartition(".")[0] for name in tensors}:
        # Inside of the block, which itself is given all of them.
        if path and (module := _part(block, path)) is not None:
            known = vars(module).get("head_rows")
            if known is None:
                module.register_forward_pre_hook(_own_rows, with_kwargs=True)
            # Where heads went before, `kept` counts those that are left.
            module.head_rows = (
                (total, tuple(kept)) if known is None else (known[0], tuple(known[1][one] for one in kept))
            )


def rows_of(block: nn.Module) -> tuple[int, tuple[int, ...]] | None:
    """For how many heads a block is given rows, and whose it keeps; `None` where it keeps all."""
    return next((known for part in block.modules() if (known := vars(part).get("head_rows"))), None)


def _own_rows(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    total, kept = module.head_rows
    given = {name: kwargs[name] for name in HEAD_ROWS if isinstance(kwargs.get(name), torch.Tensor)}
    return args, {**kwargs, **{name: _rows(value, total, kept) for name, value in given.items()}}


def _rows(tensor: torch.Tensor, total: int, kept: Sequence[int]) -> torch.Tensor:
    """Some heads' rows of a tensor, (samples, heads, ..., ...) or (samples · heads, ..., ...), if it has any."""
    axis = 1 if tensor.dim() == 4 else 0
    if tensor.shape[axis] % total:
        return tensor
    rows = tensor.unflatten(axis, (-1, total))
    index = torch.tensor(kept, dtype=torch.int64, device=tensor.device)
    return rows.index_select(axis + 1, index).flatten(axis, axis + 1)


def count_experts(block: nn.Module, tensors: Iterable[str], gone: int) -> None:
    """Have the modules that hold a block's `tensors`, and those around, say how many experts there are."""
    around = {".".join(name.split(".")[:end]) for name in tensors for end in range(1, name.count(".") + 1)}
    for module in filter(None, (_part(block, path) for path in around)):
        _lower(module, dict.fromkeys(EXPERT_COUNTS, gone))


def own_settings(model: nn.Module, config: Any) -> None:
    """Give every part of a model that is no model itself settings of its own, while those of the whole have one value.

    Some ask for a number of heads while they run (rotary embeddings, to tell the size of one).
    """
    for module in model.modules():
        if vars(module).get("config") is config and not isinstance(module, transformers.PreTrainedModel):
            module.config = _own(config)


def _own(config: Any) -> OwnSettings:
    """The settings of a part: its numbers of heads and experts, as they are, and the rest of the whole model's."""
    if isinstance(config, OwnSettings):
        return OwnSettings(config.whole, {name: value for name, value in vars(config).items() if name != "whole"})
    names = {name for name in QUERY_HEADS + KEY_HEADS + EXPERT_COUNTS if isinstance(getattr(config, name, None), int)}
    return OwnSettings(config, {name: getattr(config, name) for name in names})


def _lower(holder: object, changes: Mapping[str, int]) -> None:
    """Lower the whole numbers among the attributes of a module or of settings, each by its change."""
    for attribute, fewer in changes.items():
        value = vars(holder).get(attribute)
        if isinstance(value, int) and not isinstance(value, bool) and value > fewer:
            setattr(holder, attribute, value - fewer)


def _checking(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check of a plain class, of what all layers share."""

    def validate(self) -> None:
        with shared(self):
            check(self)

    return validate


def _config_class(base: type) -> type:
    made = {"__module__": __name__, "model_type": f"{TYPE}{base.model_type}", "__doc__": PerLayerConfig.__doc__}
    if isinstance(getattr(base, "head_dim", None), property):
        made["head_dim"] = None  # derived of a number of heads, which may be a layer's own
    made |= {name: _checking(getattr(base, name)) for name in dir(base) if name.startswith("validate_")}
    # Checked as every class of its kind: what checks is taken from the class that is decorated, and no other.
    found = strict(type(f"{PREFIX}{base.__name__}", (PerLayerConfig, base), made))
    # What a family's tensors are called on disk and in memory is known by its type.
    if (mapping := get_checkpoint_conversion_mapping(base.model_type)) is not None:
        register_checkpoint_conversion_mapping(found.model_type, mapping, overwrite=True)
    found.register_for_auto_class()
    return found


def _model_class(base: type) -> type:
    config = class_named(f"{PREFIX}{base.config_class.__name__}")
    made = {"__module__": __name__, "config_class": config, "__doc__": PerLayerModel.__doc__}
    return type(f"{PREFIX}{base.__name__}", (PerLayerModel, base), made)


def __getattr__(name: str) -> type:
    """The class of that name, made of transformers' own."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(base, type) or not issubclass(base, (PreTrainedConfig, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _config_class(base) if issubclass(base, PreTrainedConfig) else _model_class(base)
    return globals().setdefault(name, made)


def class_named(name: str) -> type:
    """A class of this module, made if it is not yet."""
    return globals().get(name) or __getattr__(name)
