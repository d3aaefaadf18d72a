"""`optimum-cli dsa env`."""

from __future__ import annotations

from .base import LeafCommand


class EnvCommand(LeafCommand):
    """Versions of everything that decides a result."""

    DESCRIPTION = "Print the versions that a bug report needs."

    @staticmethod
    def parse_args(parser):
        EnvCommand.describe(parser, "env")

    def execute(self) -> None:
        import platform

        import torch

        from ..checkpoint.description import versions

        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts = {**versions(), "platform": platform.platform(), "gpu": ", ".join(gpus) or "none"}
        for name, value in facts.items():
            print(f"- {name}: {value}")
