"""Which releases made a result."""

from __future__ import annotations

import importlib.metadata
import platform


PACKAGES = ("optimum-dsa", "torch", "transformers", "optimum", "accelerate", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """Installed versions of what decides the result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
