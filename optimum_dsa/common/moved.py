"""Modules under the names that they had before the package had rooms: for one more release, with a warning."""

from __future__ import annotations

import importlib
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


# Earlier name -> where it is; both inside the package. Names that are rooms now are not among them.
MOVED = {
    "allocation": "pruning.allocation",
    "allocation.budget": "pruning.allocation.budget",
    "allocation.function": "pruning.allocation.function",
    "allocation.heuristics": "pruning.allocation.allocators",
    "allocation.layout": "pruning.allocation.layout",
    "allocation.operations": "pruning.allocation.operations",
    "allocation.unit": "pruning.allocation.unit",
    "architecture": "model.architecture",
    "bitmask": "packed.bitmask",
    "calibration": "model.walk",
    "capture": "model.calls",
    "card": "sharing.card",
    "comparison": "evaluation.comparison",
    "configuration": "pruning.configuration",
    "conversion": "checkpoint.convert",
    "demo": "commands.embedded",
    "description": "checkpoint.description",
    "devices": "common.devices",
    "heuristics": "pruning.allocation.allocators",
    "hub": "sharing.push",
    "loading": "checkpoint.load",
    "masks": "pruning.unstructured.patterns",
    "methods": "pruning.unstructured.methods",
    "metrics": "pruning.unstructured.metrics",
    "offload": "model.offload",
    "page": "sharing.page",
    "perplexity_metric": "evaluation.metric",
    "plots": "sharing.charts",
    "provenance": "sharing.provenance",
    "quantizer": "checkpoint.transformers_loader",
    "reconstruction": "pruning.unstructured.updates",
    "registry": "common.registry",
    "report": "pruning.report",
    "schema": "common.schema",
    "shards": "checkpoint.shards",
    "statistics": "model.statistics",
    "tables": "sharing.tables",
    "tasks": "evaluation.tasks",
    "unpacking": "checkpoint.unpacking",
    "verification": "checkpoint.verify",
    "recovery.callback": "recovery.gradual.callback",
    "recovery.modes": "recovery.adapters.modes",
    "recovery.peft_method": "recovery.adapters.peft_method",
    "recovery.run": "recovery.recover",
    "recovery.schedule": "recovery.gradual.schedule",
    "search.resolve": "search.resolver",
    "search.run": "search.search",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module by its earlier name: asked first, as a folder that was left behind is taken for a module."""

    def __init__(self, package: str):
        self._package = package

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        inside = name.removeprefix(f"{self._package}.")
        # What had modules in it is a package still, or these would not be looked for.
        package = any(moved.startswith(f"{inside}.") for moved in MOVED)
        return ModuleSpec(name, self, is_package=package) if inside != name and inside in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = f"{self._package}.{MOVED[module.__name__.removeprefix(f'{self._package}.')]}"
        warnings.warn(f"{module.__name__} is {name} now; most names are in {self._package} itself.", FutureWarning, 2)
        moved = importlib.import_module(name)
        module.__doc__ = moved.__doc__
        module.__getattr__ = lambda attribute: getattr(moved, attribute)
