"""A pruned model on disk: an ordinary checkpoint with zeros, and `dsa_config.json` beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .configuration import CONFIG_NAME
from .files import new_directory, write_text
from .offload import is_offloaded
from .report import PruningReport


FORMAT_VERSION = 1
PACKAGES = ("optimum-dsa", "torch", "transformers", "optimum", "accelerate", "datasets", "safetensors")


def save_checkpoint(
    model: nn.Module,
    tokenizer: Any,
    report: PruningReport,
    base: dict[str, str | None],
    directory: str | Path,
    recovery: dict[str, Any] | None = None,
    **save_kwargs,
) -> None:
    """Write model, tokenizer and `dsa_config.json` into `directory`; whole or not at all.

    Raises:
        FileExistsError: `directory` holds something else than a pruned model.
    """
    with new_directory(directory, CONFIG_NAME) as fresh:
        if is_offloaded(model):
            _save_offloaded(model, fresh, **save_kwargs)
        else:
            model.save_pretrained(fresh, **save_kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        write_text(fresh / CONFIG_NAME, json.dumps(describe_result(report, base, recovery), indent=2) + "\n")


def _save_offloaded(model: nn.Module, directory: Path, **save_kwargs) -> None:
    """Save a model whose weights transformers has to load, a shard at a time.

    It does so where there is an `hf_device_map`, which `accelerate.cpu_offload` does not leave; and it does not see
    that offloaded weights are tied.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    save_kwargs = {"state_dict": state, "max_shard_size": "200MB", **save_kwargs}
    unmapped = not hasattr(model, "hf_device_map")
    if unmapped:
        model.hf_device_map = {"": "cpu"}
    try:
        with warnings.catch_warnings():
            # it warns that 50 GB of memory may be needed, which is its own shard size and not ours
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(directory, **save_kwargs)
    finally:
        if unmapped:
            del model.hf_device_map


def describe_result(
    report: PruningReport, base: dict[str, str | None], recovery: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of `dsa_config.json`: config, base model, allocation, achieved sparsity, calibration, versions.

    `recovery` is what is known of training after pruning, or during it.
    """
    content = {"format_version": FORMAT_VERSION, "base_model": base, **report.to_dict()}
    if recovery is not None:
        content["recovery"] = recovery
    return {**content, "versions": versions()}


def base_model(model: nn.Module) -> dict[str, str | None]:
    """Name and revision of the checkpoint that a model came from; of a local path only the last part."""
    name = getattr(model.config, "_name_or_path", "") or None
    if name and (os.path.isabs(name) or os.path.exists(name)):
        name = Path(name).resolve().name
    return {"name": name, "revision": getattr(model.config, "_commit_hash", None)}


def versions() -> dict[str, str]:
    """Installed versions of what decides the result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
