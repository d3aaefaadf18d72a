"""What this runs on, and with which releases."""

from __future__ import annotations

import platform

from .versions import versions


def environment() -> dict[str, str]:
    """Releases, platform and GPUs: what a report of a bug needs."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {**versions(), "platform": platform.platform(), "gpu": ", ".join(gpus) or "none"}
