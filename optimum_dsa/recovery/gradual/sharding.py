"""What training on several processes asks of masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn

from ...common.devices import processes_and_devices
from ...model.sharded import is_sharded


_WAY_OUT = "train with DDP (torchrun) or FSDP 2"


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


def refuse_engine(model: nn.Module) -> None:
    """Raise `ValueError` where what trains `model` keeps weights that no mask reaches: FSDP 1 and DeepSpeed.

    FSDP 1 makes one flat tensor of a block's weights. DeepSpeed's optimizer keeps weights of its own, at every stage,
    and writes them over what a callback has changed.
    """
    found = PartialState().distributed_type
    if found == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed (ZeRO, any stage) keeps a copy of the weights in its optimizer, out of which zeros that were "
            f"made in the model come back; {_WAY_OUT}."
        )
    if found == DistributedType.FSDP and not is_sharded(model):
        raise ValueError(f"FSDP 1 makes one flat tensor of a block's weights, in which no mask is held; {_WAY_OUT}.")


def refuse_launched() -> None:
    """Raise `ValueError` where `accelerate launch` was asked for FSDP 1 or DeepSpeed, before any work."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(f"recover does not train with DeepSpeed (ZeRO, any stage); {_WAY_OUT}.")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "accelerate was launched with FSDP of its own configuration; start recover with torchrun, and with "
            "sharding='fsdp'."
        )
