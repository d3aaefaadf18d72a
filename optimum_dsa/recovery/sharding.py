"""What training on several processes asks of masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor


@torch.no_grad()
def synchronise(parameters: Iterable[Tensor]) -> None:
    """Give every process the weights that the first one has, in place: ties in pruning may break differently."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)


def refuse_sharded() -> None:
    """Raise `ValueError` under FSDP or DeepSpeed, where no process has whole weights."""
    for kind, name in ((DistributedType.FSDP, "FSDP"), (DistributedType.DEEPSPEED, "DeepSpeed")):
        if PartialState().distributed_type == kind:
            raise ValueError(
                f"DSACallback needs whole weights in every process, and {name} divides them; train with DDP "
                "(torchrun), or with a sparse adapter and without the callback: its zeros hold by themselves."
            )
