"""What a smaller model is: a plain one of its class, with zeros where blocks differ, or one whose layers differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers
from torch import Tensor, nn

from ...model.inputs import text_part
from ...model.modeling_per_layer import KEY_HEADS, QUERY_HEADS
from .per_layer import MLP_WIDTHS, known, per_layer, why_not
from .slicing import cut_out, silence
from .structure import Structures


@dataclass(frozen=True)
class Layout:
    """How the structures that go leave a model.

    Attributes:
        settle (`Callable`): has the model, once it is cut, say what it is: model -> nothing.
        cut (`Mapping[str, int]`, *optional*): unit -> how many are cut out, where others stay as zeros.
    """

    settle: Callable[[nn.Module], Any]
    cut: Mapping[str, int] | None = None

    def take(self, model: nn.Module, structures: Structures, gone: Tensor) -> int:
        """Take the structures `gone`, (n,) int64, out of the model, in place; how many of them are zeros now."""
        count = len(gone) if self.cut is None else self.cut[structures.unit]
        silence(model, structures, gone[count:], whole=True)
        cut_out(model, structures, gone[:count])
        return len(gone) - count


def uniform(model: nn.Module, units: Mapping[str, Structures], counts: Mapping[str, int]) -> Layout:
    """A plain, smaller model: all blocks lose as many of a kind. `counts`: unit -> how many go.

    Raises:
        ValueError: no configuration of its class says it: blocks differ, or the class derives a width from others.
    """
    if getattr(model.config, "is_heterogeneous", False):
        raise ValueError(
            f"The layers of this {type(model).__name__} differ already, and a plain class has one width for all; use "
            "layout='per_layer'."
        )
    changes = _changes(model, units, counts)

    def say(config: Any) -> None:
        for name, value in changes.items():
            setattr(text_part(config), name, value)

    said = ", ".join(f"{name}={value}" for name, value in changes.items())
    troubles = []
    for made, become in ((type(model), say), *_as_mistral(model, say)):
        config = copy.deepcopy(model.config)
        become(config)
        if (trouble := why_not(made, config, model, units, counts)) is None:
            return Layout(partial(_settle, made=made, become=become))
        troubles.append(trouble)
    raise ValueError(
        f"{type(model.config).__name__} cannot say what is left ({said}: {troubles[0]}); cut other structures, or "
        "another share; or use layout='per_layer', which needs this package or trust_remote_code=True to load, or "
        "layout='padded', which fills up with zeros."
    )


def padded(model: nn.Module, units: Mapping[str, Structures], counts: Mapping[str, int]) -> Layout:
    """A plain model of its class, everywhere as wide as its widest block; in the others zeros stand for what went."""
    if getattr(model.config, "is_heterogeneous", False):
        uniform(model, units, counts)  # which says why not
    least: dict[str, int] = {}
    for unit, each in units.items():
        least[each.kind] = min(counts[unit], least.get(each.kind, counts[unit]))
    # What no configuration says stays as wide as it was: heads first, of which many classes derive a size.
    for kinds in (set(least), {"ffn"}):
        cut = {unit: least[each.kind] if each.kind in kinds else 0 for unit, each in units.items()}
        try:
            return Layout(uniform(model, units, cut).settle, cut)
        except ValueError:
            continue
    return Layout(lambda model: None, dict.fromkeys(units, 0))


# What a smaller model is -> what makes sure of it before any work: model, units, how many go of each -> layout.
LAYOUTS = {"uniform": uniform, "per_layer": lambda *given: Layout(per_layer(*given)), "padded": padded}


def _settle(model: nn.Module, made: type, become: Callable[[Any], None]) -> None:
    become(model.config)
    model.__class__ = made


def _as_mistral(model: nn.Module, say: Callable[[Any], None]) -> list[tuple[type, Callable[[Any], None]]]:
    """The class that computes what a Llama's does, with its configuration, whose heads need not divide a width."""
    made = getattr(transformers, type(model).__name__.replace("Llama", "Mistral", 1), None)
    config = model.config
    if getattr(transformers, type(model).__name__, None) is not type(model) or config.model_type != "llama":
        return []
    if made is None or config.attention_bias or config.mlp_bias or config.pretraining_tp not in (None, 1):
        return []

    def become(config: Any) -> None:
        config.__class__ = transformers.MistralConfig
        for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
            vars(config).pop(name, None)
        config.sliding_window = None
        say(config)

    return [(made, become)]


def _changes(model: nn.Module, units: Mapping[str, Structures], counts: Mapping[str, int]) -> dict[str, int]:
    """What the configuration says once `counts` structures of every unit are cut out: setting -> number."""
    alike: dict[str, set[tuple[int, int]]] = {}
    for unit, each in units.items():
        alike.setdefault(each.kind, set()).add((len(each), counts[unit]))
    if any(len(numbers) > 1 for numbers in alike.values()):
        kind = next(kind for kind, numbers in alike.items() if len(numbers) > 1)
        raise ValueError(f"Blocks come to differ in their {kind}, and layout='uniform' has one for all.")
    changes: dict[str, int] = {}
    part = text_part(model.config)
    for each in {each.kind: each for each in units.values()}.values():
        count, gone = len(each), counts[each.unit]
        queries, keys = (per * (count - gone) for per in each.heads)
        if each.kind == "ffn":
            changes |= dict.fromkeys(known(part, MLP_WIDTHS, count), count - gone)
        elif gone:
            changes |= dict.fromkeys(known(part, QUERY_HEADS, each.heads[0] * count), queries)
            changes |= dict.fromkeys(known(part, KEY_HEADS, each.heads[1] * count), keys)
            # Derived of the hidden size and the heads where it is not said; some call another size by that name.
            derived = isinstance(getattr(type(part), "head_dim", None), property)
            if not derived and getattr(part, "head_dim", None) in (None, each.head_size):
                changes["head_dim"] = each.head_size
    return changes
