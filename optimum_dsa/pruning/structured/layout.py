"""What a smaller model is: a plain one of its class, with zeros where blocks differ, or one whose layers differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import transformers
from torch import Tensor, nn

from ...model.inputs import text_part
from ...model.modeling_per_layer import EXPERT_COUNTS, KEY_HEADS, QUERY_HEADS
from .per_layer import going, known, per_layer, why_not, width
from .slicing import cut_out, rewriting, silence
from .structure import WHOLE, Structures
from .wholes.blocks import shorter


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
        with rewriting(model, structures):
            if count < len(gone):
                silence(model, structures, gone[count:], whole=True)
            cut_out(model, structures, gone[:count])
        return len(gone) - count


def uniform(
    model: nn.Module,
    units: Mapping[str, Structures],
    counts: Mapping[str, int],
    gone: Mapping[str, Sequence[int]] | None = None,
) -> Layout:
    """A plain, smaller model: all blocks lose as many of a kind. `counts`: unit -> how many go.

    Args:
        gone (`Mapping[str, Sequence[int]]`, *optional*): of units of blocks, which; by default the last.

    Raises:
        ValueError: no configuration of its class says it: blocks differ, or the class derives a width from others.
    """
    if getattr(model.config, "is_heterogeneous", False):
        raise ValueError(
            f"The layers of this {type(model).__name__} differ already, and a plain class has one width for all; use "
            "layout='per_layer'."
        )
    if sloped := next((unit for unit, each in units.items() if each.slopes and counts[unit]), None):
        raise ValueError(
            f"{sloped} would lose heads, of which the model gives each a slope by their number, and those that stay "
            "keep theirs; a plain class says no such thing. Use layout='per_layer', which needs this package or "
            "trust_remote_code=True to load, or layout='padded', which fills up with zeros."
        )
    changes = _changes(model, units, counts, gone or {})

    def say(config: Any) -> None:
        for name, value in changes.items():
            setattr(text_part(config), name, value)

    said = ", ".join(f"{name}={value}" for name, value in changes.items()) or "no setting has the number"
    troubles = []
    for made, become in ((type(model), say), *_as_mistral(model, say)):
        config = copy.deepcopy(model.config)
        become(config)
        if (trouble := why_not(made, config, model, units, counts, gone)) is None:
            # Which blocks went, the configuration knows as soon as they are gone.
            alone = {each.kind for each in units.values()} == {"block"}
            return Layout(partial(_settle, made=made, become=(lambda config: None) if alone else become))
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
    least: dict[tuple[str, int], int] = {}
    for unit, each in units.items():
        like = (each.kind, len(each))
        least[like] = min(counts[unit], least.get(like, counts[unit]))
    # What no configuration says stays as wide as it was: heads first, of which many classes derive a size.
    # Experts that went are no zeros: whatever number of zeros there is, a router sends tokens there.
    always = {kind for kind, _ in least if kind in WHOLE}
    if differing := [
        unit for unit, each in units.items() if each.kind in always and counts[unit] != least[each.kind, len(each)]
    ]:
        raise ValueError(
            f"{differing[0]} comes to lose {counts[differing[0]]}, and another fewer: what is whole leaves no zeros; "
            "use layout='uniform' or 'per_layer'."
        )
    for kinds in ({kind for kind, _ in least}, {"ffn"} | always):
        cut = {unit: least[each.kind, len(each)] if each.kind in kinds else 0 for unit, each in units.items()}
        try:
            return Layout(uniform(model, units, cut).settle, cut)
        except ValueError:
            continue
    cut = {unit: counts[unit] if each.kind in always else 0 for unit, each in units.items()}
    return Layout(uniform(model, units, cut).settle if always else lambda model: None, cut)


def differing(model: nn.Module, units: Mapping[str, Structures], counts: Mapping[str, int]) -> Layout:
    """A model whose layers may differ, of a class of this package; without some blocks it is one of its own class.

    Raises:
        ValueError: there is no such class for its family, or none that says what is left.
    """
    if {each.kind for each in units.values()} != {"block"}:
        return Layout(per_layer(model, units, counts))
    if getattr(model.config, "is_heterogeneous", False):
        raise ValueError(
            f"The layers of this {type(model).__name__} differ already, and their settings are told by number; take "
            "blocks out first, and others out of what is left."
        )
    return Layout(lambda model: None)


# What a smaller model is -> what makes sure of it before any work: model, units, how many go of each -> layout.
LAYOUTS = {"uniform": uniform, "per_layer": differing, "padded": padded}


def unsaid(model: nn.Module, units: Mapping[str, Structures]) -> set[str]:
    """The units of channels whose number no setting of the model's configuration has."""
    part = text_part(model.config)
    if getattr(part, "is_heterogeneous", False):
        return set()
    return {unit for unit, each in units.items() if each.kind == "ffn" and not width(part, len(each), len(each) - 1)}


def _settle(model: nn.Module, made: type, become: Callable[[Any], None]) -> None:
    part = text_part(model.config)
    before = {name: vars(part)[name] for name in EXPERT_COUNTS if name in vars(part)}
    become(model.config)
    # The model itself may have noted how many experts there are.
    after = {value: vars(part)[name] for name, value in before.items() if vars(part)[name] != value}
    for module in model.modules() if after else ():
        if getattr(module, "config", None) is part and (number := vars(module).get("num_experts")) in after:
            module.num_experts = after[number]
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


def _changes(
    model: nn.Module, units: Mapping[str, Structures], counts: Mapping[str, int], gone: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """What the configuration says once `counts` structures of every unit are cut out: setting -> value."""
    alike: dict[tuple[str, int], set[int]] = {}
    for unit, each in units.items():
        alike.setdefault((each.kind, len(each)), set()).add(counts[unit])
    if any(len(numbers) > 1 for numbers in alike.values()):
        kind = next(kind for (kind, _), numbers in alike.items() if len(numbers) > 1)
        raise ValueError(f"Blocks come to differ in their {kind}, and layout='uniform' has one for all.")
    changes: dict[str, Any] = {}
    part = text_part(model.config)
    for each in {(each.kind, len(each)): each for each in units.values()}.values():
        count, less = len(each), counts[each.unit]
        queries, keys = (per * (count - less) for per in each.heads)
        if each.kind == "ffn":
            changes |= width(part, count, count - less)
        elif each.kind == "expert":
            changes |= {name: count - less for name in EXPERT_COUNTS if getattr(part, name, None) == count}
        elif each.kind == "block":
            changes |= shorter(part, count, set(going(each, less, gone)))
        elif less:
            changes |= dict.fromkeys(known(part, QUERY_HEADS, each.heads[0] * count), queries)
            changes |= dict.fromkeys(known(part, KEY_HEADS, each.heads[1] * count), keys)
            # Derived of the hidden size and the heads where it is not said; some call another size by that name.
            derived = isinstance(getattr(type(part), "head_dim", None), property)
            if not derived and getattr(part, "head_dim", None) in (None, each.head_size):
                changes["head_dim"] = each.head_size
    return changes
