"""What training on several processes asks of masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate.state import AcceleratorState
from torch import Tensor


@torch.no_grad()
def synchronise(parameters: Iterable[Tensor]) -> None:
    """Give every process the weights that the first one has, in place: ties in pruning may break differently."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)


def refuse_sharded() -> None:
    """Raise `ValueError` under FSDP or DeepSpeed, where no process has whole weights."""
    for plugin, name in (("fsdp_plugin", "FSDP"), ("deepspeed_plugins", "DeepSpeed")):
        if AcceleratorState._shared_state.get(plugin):
            raise ValueError(
                f"DSACallback needs whole weights in every process, and {name} divides them; train with DDP "
                "(torchrun), or with a sparse adapter and without the callback: its zeros hold by themselves."
            )
