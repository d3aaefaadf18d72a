"""On which device a process works, alone or as one of several."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from functools import cache

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from .machine import memory_available


WAIT = timedelta(hours=4)  # that one process waits for another; a launcher ends it as soon as that one fails

logger = logging.getLogger(__name__)


def choose_device(processes: int, devices: int, local_rank: int | None = None) -> str:
    """The device of one of so many `processes` on a machine with so many GPUs: "cuda", "cuda:1", ... or "cpu".

    Each has a GPU of its own, or all of them work on the CPU: NCCL refuses two processes on one GPU, and one process
    that talked through another backend than the rest would wait for them forever.
    """
    if devices < max(processes, 1):
        return "cpu"
    return "cuda" if local_rank is None else f"cuda:{local_rank % devices}"


def own_device() -> str:
    """The device of this process; warns, once, where there are GPUs but fewer than processes."""
    processes, devices = processes_and_devices()
    local_rank = int(os.environ["LOCAL_RANK"]) if os.environ.get("LOCAL_RANK", "-1") != "-1" else None
    chosen = choose_device(processes, devices, local_rank)
    if devices and chosen == "cpu" and not local_rank:
        _warn(processes, devices)
    return chosen


def own_share() -> dict[int | str, int] | None:
    """What of this machine's memory this process may fill, in bytes, as accelerate's `max_memory`; `None` where all.

    The processes on a machine share its memory evenly, and its GPUs are dealt out in turn, so that the one that a
    process talks through (`own_device`) is its own. As accelerate does it, a tenth is left for what is computed.
    """
    processes, devices = processes_and_devices()
    if processes == 1:
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    own = range(local_rank, devices, processes) if devices >= processes else ()
    limits: dict[int | str, int] = {index: memory_available(f"cuda:{index}") * 9 // 10 for index in own}
    return limits | {"cpu": memory_available() * 9 // 10 // processes}


def use_cpu() -> bool:
    """Whether this process should train on the CPU: `TrainingArguments(..., use_cpu=use_cpu())`.

    So it is where there is no GPU, and where `torchrun` started more processes than there are GPUs. These then talk
    through gloo, and a warning says so: NCCL needs a GPU for each.
    """
    return own_device() == "cpu"


def process_state() -> PartialState:
    """accelerate's view of the processes; where there are several and `use_cpu` says so, they talk through gloo."""
    # Whoever waits while the first process writes a large model may wait for long.
    return PartialState(cpu=use_cpu(), timeout=WAIT)


def shard_on_cpu() -> None:
    """Have accelerate take FSDP on the CPU for what it is; to be called before the Trainer is made.

    It looks for the plugin where processes work on GPUs alone, and on the CPU trains with DDP without a word. PyTorch
    shards there as well, through gloo.
    """
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def processes_and_devices() -> tuple[int, int]:
    """How many processes `torchrun` started on this machine, and how many GPUs each of them sees.

    Other launchers, which say no LOCAL_WORLD_SIZE, show every process its own GPU only: there it is one of each.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)), devices


@cache
def _warn(processes: int, devices: int) -> None:
    logger.warning(
        "%d processes and %d GPU%s on this machine: they work on the CPU and talk through gloo. To work on GPUs, "
        "start no more processes than GPUs.",
        processes,
        devices,
        "" if devices == 1 else "s",
    )
