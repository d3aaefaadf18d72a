"""Prune transformers models: discovered sparsity allocations, exact budgets, ordinary checkpoints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from .common.import_hook import after_import
from .common.moved import MovedModules
from .common.version import VERSION as __version__  # noqa: F401 - of the package


# Public name -> module. Nothing is imported before it is used: `optimum-cli --help` imports this package.
_PUBLIC = {
    **dict.fromkeys(("Architecture", "Block", "Weight"), "model.architecture"),
    **dict.fromkeys(("allocation_chart", "heat_map", "search_curves", "training_curves"), "sharing.charts"),
    **dict.fromkeys(("Measured", "quality_chart"), "sharing.charts"),
    "ALLOCATIONS": "pruning.allocation",
    "Allocation": "pruning.allocation",
    "AllocationFunction": "pruning.allocation",
    "Calibration": "pruning.calibration",
    "Candidate": "search.space",
    "Choice": "pruning.unstructured.updates",
    "DSACallback": "recovery.gradual.callback",
    "DSAConfig": "pruning.configuration",
    "DSAPruner": "pruner",
    "DSAQuantizationConfig": "checkpoint.transformers_loader",
    "DSAStructuredConfig": "pruning.structured.configuration",
    **dict.fromkeys(("Quantised", "quantize"), "checkpoint.integers"),
    "ENCODINGS": "checkpoint.encodings",
    "EXPORTS": "checkpoint.exports",
    **dict.fromkeys(("FORMS", "load_as"), "checkpoint.running"),
    "Encoding": "checkpoint.encodings",
    "DataConfig": "data",
    "Heuristic": "pruning.allocation",
    "IMPORTANCES": "pruning.structured.importance",
    "SHARES": "pruning.structured.widths.shares",
    "Tolerated": "pruning.structured.tolerance",
    "find_share": "pruning.structured.tolerance",
    "LEARNERS": "pruning.structured.learners",
    "LayerStatistics": "model.statistics",
    "METHODS": "pruning.unstructured.methods",
    "METRICS": "pruning.unstructured.metrics",
    "MODES": "recovery.adapters.modes",
    "Measurement": "evaluation.measurement",
    "Method": "pruning.unstructured.methods",
    "Mode": "recovery.adapters.modes",
    "OutputFolder": "common.output",
    "PERMUTATIONS": "pruning.unstructured.permutations",
    "POST_PROCESS": "pruning.allocation",
    "PRE_PROCESS": "pruning.allocation",
    "Pattern": "pruning.unstructured.patterns",
    "Perplexity": "evaluation.metric",
    "Plan": "pruning.planning.plan",
    "Protocol": "evaluation.measurement",
    "PruningReport": "pruning.report",
    "PruningSchedule": "recovery.gradual.schedule",
    "QUALITIES": "pruning.presets",
    "RECOVERIES": "recovery.recoveries",
    "REDUCTION": "pruning.allocation",
    "ReconstructConfig": "pruning.sections",
    "Reconstruction": "pruning.training",
    "RecoveryConfig": "recovery.configuration",
    "RecoveryResult": "recovery.result",
    "Registry": "common.registry",
    "RunningStatistics": "recovery.gradual.running_statistics",
    "SCHEDULES": "recovery.gradual.schedule",
    "STRATEGIES": "search.strategies",
    "SearchResult": "search.result",
    "SearchSpace": "search.space",
    "SearchTrace": "search.trace",
    "Sensitivity": "search.sensitivity",
    "SparseLoraConfig": "recovery.adapters.peft_method",
    **dict.fromkeys(("Speed", "SpeedComparison", "read_speed", "save_speed"), "evaluation.speed_result"),
    "StructuredReport": "pruning.structured.prune",
    "TRANSFORM": "pruning.allocation",
    "Trial": "search.trace",
    "UPDATES": "pruning.unstructured.updates",
    "Unit": "pruning.allocation",
    "UpdateConfig": "pruning.sections",
    "TaskProtocol": "evaluation.measurement",
    "ValuesConfig": "pruning.sections",
    "Verification": "checkpoint.verify",
    "WalkedBlock": "model.walk",
    "allocate": "pruning.allocate",
    "capture_calls": "model.calls",
    "comparison_table": "evaluation.comparison",
    "convert": "checkpoint.convert",
    "demo_model": "commands.embedded",
    "demo_texts": "commands.embedded",
    "environment": "common.environment",
    "evaluate_tasks": "evaluation.tasks",
    "export": "checkpoint.exports",
    "find_architecture": "model.architecture",
    "fit_to_budget": "pruning.allocation",
    **dict.fromkeys(("GeneratedText", "answers_chats", "generate_text"), "evaluation.generate"),
    "load_calibration": "pruning.calibration",
    "load_tokens": "data",
    "measure": "evaluation.measure",
    "measure_speed": "evaluation.speed",
    "own_device": "common.devices",
    "perplexity": "evaluation.perplexity",
    "perplexity_with_error": "evaluation.perplexity",
    "lora_on_packed": "recovery.adapters.packed",
    "plan": "checkpoint.plan",
    "plot_search": "sharing.pictures",
    "plot_sensitivity": "sharing.pictures",
    "prune": "pruning.prune",
    "prune_structures": "pruning.structured.prune",
    "push_folder": "sharing.push",
    "read_results": "evaluation.results",
    "schema": "checkpoint.description",
    "run_demo": "commands.embedded",
    "save_results": "evaluation.results",
    "sensitivity": "search.sensitivity",
    "split_windows": "data",
    "use_cpu": "common.devices",
    "verify": "checkpoint.verify",
    "walk_blocks": "model.walk",
    "write_report": "sharing.page",
    **dict.fromkeys(("from_tensor_cores", "to_tensor_cores"), "packed.tensor_cores"),
}

__all__ = sorted(_PUBLIC)


def _following(module: str) -> Callable[[], None]:
    """What makes itself known to a dependency when it is imported, also where it is what imported that."""
    return lambda: importlib.import_module(module, __name__) and None


after_import("transformers.quantizers.auto", _following(".checkpoint.transformers_loader"))  # compressed ones load
after_import("transformers.models.auto.configuration_auto", _following(".model.per_layer"))  # so do per-layer ones
after_import("peft", _following(".recovery.adapters.peft_method"))  # sparse adapters load


sys.meta_path.insert(0, MovedModules(__name__))


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
