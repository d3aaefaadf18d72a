"""What training on several processes asks of masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from ...common.devices import processes_and_devices


@torch.no_grad()
def synchronise(parameters: Iterable[Tensor]) -> None:
    """Give every process the weights of the first, of any shape, in place: ties in pruning may break differently."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)


def refuse_shared_devices() -> None:
    """Raise `ValueError` where several processes would train on one GPU through NCCL, which fails in its own words."""
    processes, devices = processes_and_devices()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or processes <= devices:
        return
    if "nccl" in torch.distributed.get_backend():
        raise ValueError(
            f"{processes} processes share {devices} GPU{'' if devices == 1 else 's'}, which NCCL refuses; start "
            "fewer, or train on the CPU with TrainingArguments(use_cpu=optimum_dsa.use_cpu())."
        )


def refuse_sharded() -> None:
    """Raise `ValueError` under FSDP or DeepSpeed, where no process has whole weights."""
    for kind, name in ((DistributedType.FSDP, "FSDP"), (DistributedType.DEEPSPEED, "DeepSpeed")):
        if PartialState().distributed_type == kind:
            raise ValueError(
                f"DSACallback needs whole weights in every process, and {name} divides them; train with DDP "
                "(torchrun), or with a sparse adapter and without the callback: its zeros hold by themselves."
            )
