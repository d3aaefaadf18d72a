"""`optimum-cli dsa env`."""

from __future__ import annotations

from .base import LeafCommand


class EnvCommand(LeafCommand):
    """Versions of everything that decides a result."""

    DESCRIPTION = "Print the versions that a bug report needs."

    @staticmethod
    def parse_args(parser):
        EnvCommand.describe(parser, "env")

    def execute(self) -> dict[str, str]:
        import torch

        from ..common.environment import environment
        from ..packed.loading import load
        from ..packed.measured import shown
        from ..packed.nvcc import cache_folder, described

        kernels = load(warn=False)
        facts = {**environment(), "packed products": f"{kernels.name} ({kernels.reason})"}
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            facts["packed products on the GPU"] = (
                described(f"{major}{minor}") if major >= 8 else f"unpacked: sm_{major}{minor} is older than sm_80"
            )
        if measured := shown(cache_folder()):
            facts["measured on cards"] = measured
        for name, value in facts.items():
            print(f"- {name}: {value}")
        return facts
