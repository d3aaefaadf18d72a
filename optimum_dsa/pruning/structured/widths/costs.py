"""What structures cost: parameters, operations for a token, bytes of a cache; a budget counts one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from ....model.architecture import Architecture
from ..structure import Structures


@dataclass(frozen=True)
class Cost:
    """What of a model a budget counts.

    Attributes:
        each (`Mapping[str, int]`): unit -> what one of its structures costs.
        total (`int`): what the dense model's blocks cost, structures or not.
        what (`str`): that is counted, in words.
    """

    each: Mapping[str, int]
    total: int
    what: str


# (model, its architecture, all structures that it has, tokens of a sequence) -> `Cost`
Counts = Callable[[nn.Module, Architecture, Mapping[str, Structures], int], Cost]


def parameters(model: nn.Module, architecture: Architecture, units: Mapping[str, Structures], length: int) -> Cost:
    """Parameters: of one structure all that it owns, biases too; in all those of the blocks' matrices.

    Of whole blocks those of norms, too, so that half of it are half of the blocks.
    """
    each = {unit: structures.cost(model) for unit, structures in units.items()}
    if blocks := [unit for unit, structures in units.items() if structures.kind == "block"]:
        return Cost(each, sum(each[unit] * len(units[unit]) for unit in blocks), "parameters")
    return Cost(each, sum(weight.size for weight in architecture.weights) + excluded(architecture), "parameters")


def excluded(architecture: Architecture) -> int:
    """Weights that `exclude` names: they stay, and are a part of what a share is of all the same."""
    names = [name for name, why in architecture.dense.items() if why == "excluded"]
    return sum(architecture.dense_sizes[name] for name in names)


def flops(model: nn.Module, architecture: Architecture, units: Mapping[str, Structures], length: int) -> Cost:
    """Floating point operations for a token that attends to `length` tokens, two for each product.

    Products with the blocks' matrices, and those of heads with keys and values. Of experts, each token meets as many
    as the model's configuration says, so that none costs more than its share.
    """
    each, total = {}, 0.0
    for unit, structures in units.items():
        matrices = sum(
            cut.index.shape[1] * (parameter.numel() // parameter.shape[cut.axis])
            for cut in structures.cuts
            if (parameter := model.get_parameter(cut.tensor)).dim() > 1
        )
        attended = 4 * length * structures.reads[0].index.shape[1] if structures.heads[0] else 0
        each[unit] = 2 * matrices + attended
        total += attended * len(structures)
    met = shares_met(model, architecture)
    total += sum(2 * weight.size * met.get((weight.module, weight.attribute), 1.0) for weight in architecture.weights)
    return Cost(each, round(total) + 2 * excluded(architecture), "operations for a token")


def kv(model: nn.Module, architecture: Architecture, units: Mapping[str, Structures], length: int) -> Cost:
    """Bytes of a token in the cache of keys and values, of the attention whose heads can be cut.

    What has no head of keys and values, such as a channel of an MLP, costs nothing.
    """
    each, total = {}, 0
    for unit, structures in units.items():
        queries, keys = structures.heads
        if not queries:
            each[unit] = 0
            continue
        reader = structures.reads[0]
        size = 2 * reader.index.shape[1] // queries * model.get_parameter(reader.tensor).element_size()
        each[unit] = keys * size
        # One head of keys and values that all query heads share stays, and is part of the cache.
        total += keys * size * len(structures) if keys else size
    return Cost(each, total, "bytes of a token in the cache")


def latency(model: nn.Module, architecture: Architecture, units: Mapping[str, Structures], length: int) -> Cost:
    """Nanoseconds of this machine for a window of `length` tokens; see `latency.py`."""
    from .latency import latency as timed

    return timed(model, architecture, units, length)


COSTS: Mapping[str, Counts] = {"parameters": parameters, "flops": flops, "kv": kv, "latency": latency}
# What is no fact of the model, but of the machine, is looked at where it is asked for.
TIMED = ("latency",)


def shares_met(model: nn.Module, architecture: Architecture) -> dict[tuple[str, str], float]:
    """(module, attribute) of experts that are stacked -> the share of them that a token is given to."""
    beside = Counter((weight.module, weight.attribute) for weight in architecture.weights if weight.expert is not None)
    met = experts_met(model)
    return {place: min(met / number, 1.0) if met else 1.0 for place, number in beside.items()}


def experts_met(model: nn.Module) -> int | None:
    """How many experts a token is given to, as the configuration says; `None` where it says nothing."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    names = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
