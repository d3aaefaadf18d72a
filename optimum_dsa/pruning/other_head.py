"""A model under another head than it was pruned with: the same blocks under other names, and no head of before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from ..model.adapters import inner_model, plain_name
from ..model.architecture import GRANULARITIES, Architecture, is_named
from .allocation import Allocation
from .allocation.layout import place
from .report import PruningReport


if TYPE_CHECKING:
    from .structured.prune import StructuredReport


def is_other_head(model: nn.Module, architectures: Iterable[str] | None = None) -> bool:
    """Whether `model` is of none of the classes in `architectures`, by default those that its configuration names."""
    inner = inner_model(model)
    known = getattr(getattr(inner, "config", None), "architectures", None) if architectures is None else architectures
    return bool(known) and type(inner).__name__ not in known


def report_for(model: nn.Module, report: PruningReport) -> PruningReport:
    """`report` under the names that its weights have in `model`, which may have another head; else `report` itself.

    Names are matched relative to the model under the head: "model.layers.0" of a language model is "layers.0" of the
    model alone. What was pruned outside the blocks, such as the head of before, is left out where it is no more.
    """
    inner = inner_model(model)
    names = [unit for unit in report.allocation.sizes if place(unit).index is not None]
    lists = dict.fromkeys(place(unit).stack for unit in names)
    there = [plain_name(name) for name, module in inner.named_modules() if isinstance(module, nn.ModuleList)]
    moved = {stack: _found(stack, there) for stack in lists}
    outside = tuple(pattern for pattern in report.config.include if is_named(inner, pattern))
    same = all(stack == new for stack, new in moved.items()) and outside == report.config.include
    if same or None in moved.values() or not lists:
        return report
    # A unit outside the blocks is their one block, or a matrix of its own.
    gone = set() if outside else {unit for unit in report.allocation.sizes if place(unit).index is None}

    def renamed(name: str) -> str:
        return _renamed(name, moved)

    def own(values: Mapping) -> dict:
        return {renamed(name): value for name, value in values.items() if name not in gone}

    allocation = report.allocation
    allocation = replace(allocation, sparsity=own(allocation.sparsity), sizes=own(allocation.sizes))
    # what is left of one parameter, `name[3]`, is named by that
    dense = {name: why for name, why in own(report.dense).items() if is_named(inner, name.partition("[")[0])}
    given = report.config.allocation
    config = replace(
        report.config,
        include=outside,
        blocks=tuple(moved.get(stack, stack) for stack in report.config.blocks),
        # By name and no more by patterns, which may have the part in front that is another now.
        exclude=tuple(name for name, why in dense.items() if why == "excluded"),
        allocation=allocation if isinstance(given, Allocation) else given,
    )
    return replace(
        report,
        config=config,
        allocation=allocation,
        achieved=own(report.achieved),
        dense=dense,
        damping=own(report.damping),
        permuted=own(report.permuted),
        reconstruction=own(report.reconstruction),
        unseen=tuple(map(renamed, report.unseen)),
        zeros_before=own(report.zeros_before),
        dense_sizes={name: size for name, size in own(report.dense_sizes).items() if name in dense},
        structured=_renamed_structures(report, renamed),
    )


def _renamed_structures(report: PruningReport, name: Callable[[str], str]) -> StructuredReport | None:
    if report.structured is None:
        return None
    from .structured.described import renamed  # which prunes with steps that are reported under names of here

    return renamed(report.structured, name)


def allocation_for(architecture: Architecture, given: Allocation) -> Allocation:
    """`given` under the names of `architecture`, where these have adapters in them, or another part in front."""
    units = (unit for known in GRANULARITIES for unit in architecture.units(known))
    names = {plain_name(unit): unit for unit in units}
    own_names = set(names.values())
    there = [plain_name(stack.name) for stack in architecture.stacks]
    lists = dict.fromkeys(place(unit).stack for unit in given.sparsity if place(unit).index is not None)
    moved = {stack: _found(stack, there) or stack for stack in lists}

    def own(values: Mapping) -> dict:
        found = {}
        for unit, value in values.items():
            name = _renamed(unit, moved)
            found[unit if unit in own_names else names.get(name, unit)] = value
        return found

    return replace(given, sparsity=own(given.sparsity), sizes=own(given.sizes))


def _renamed(name: str, moved: Mapping[str, str]) -> str:
    """A name with its list, one of `moved`, being what that stands for."""
    old = next((stack for stack in moved if name.startswith(f"{stack}.")), None)
    return name if old is None else f"{moved[old]}{name.removeprefix(old)}"


def _found(stack: str, there: Iterable[str]) -> str | None:
    """The list that `stack` is in another model: of the same name, or of one with more or less in front of it."""
    if stack in there:
        return stack
    alike = [name for name in there if name.endswith(f".{stack}") or stack.endswith(f".{name}")]
    return alike[0] if len(alike) == 1 else None
