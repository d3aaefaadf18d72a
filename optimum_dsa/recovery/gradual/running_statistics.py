"""Statistics of a training that is under way, in place of calibration text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...model.architecture import Architecture
from ...model.left_dense import excluding, told
from ...model.statistics import CollectedStatistics, LayerStatistics


FILE = "dsa_statistics.safetensors"  # in a Trainer's checkpoint


class RunningStatistics:
    """What weights are given while they are trained: the calibration of a `DSACallback` that needs no text.

    ```python
    schedule = PruningSchedule(start=50, end=500, every=50)
    DSACallback(DSAConfig(0.7, allocation="owl"), RunningStatistics(), schedule).attach(trainer)
    ```

    Sums over inputs are collected in every training forward pass, padding included, at the price of one pass over each
    input. They belong to the model as it was in the last few steps, dense blocks before pruned ones; calibration text
    is walked block by block, each after those before it were pruned, and needs forward passes of its own.

    Args:
        decay (`float`, defaults to 0.9): What an optimizer step leaves of what was collected before it; 1 keeps all.
    """

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is in [0, 1], got {decay!r}.")
        self.decay = decay
        self.statistics: dict[str, LayerStatistics] = {}
        self._handles = []

    def watch(self, model: nn.Module, architecture: Architecture, gram: bool = False, mean: bool = False) -> None:
        """Begin to collect, anew, for all weights of `architecture`; X·Xᵀ as well with `gram`, Σ x with `mean`.

        Raises:
            ValueError: a weight is one of several experts in one parameter, whose inputs no hook sees.
        """
        self.release()
        self.statistics.clear()
        runs = {stack.name: self._runs_of(model, stack.name) for stack in architecture.stacks}
        for weight in architecture.weights:
            if weight.expert is not None:
                fused = {each.name: each.size for each in architecture.weights if each.expert is not None}
                rest = sum(each.size for each in architecture.weights) - sum(fused.values())
                raise ValueError(
                    f"Running statistics cannot see what {weight.name} multiplies; give calibration text, or leave "
                    f"experts dense with exclude={excluding(fused)} ({told(fused, rest)})."
                )
            device = weight.tensor(model).device
            found = LayerStatistics(weight.shape[1], device, gram, sequences=1, with_sum=mean)
            self.statistics[weight.name] = found
            # an adapter around the weight may multiply by it without calling it, but is given the same input
            module = model.get_submodule(weight.module.removesuffix(".base_layer"))
            running = next((runs[stack] for stack in runs if weight.module.startswith(f"{stack}.")), None)
            self._handles.append(module.register_forward_pre_hook(_observe(found, running), with_kwargs=True))

    def _runs_of(self, model: nn.Module, stack: str) -> list[str] | None:
        """A list that is not empty while the owner of a stack runs it; `None` where the model itself is the owner.

        With gradient checkpointing a block runs a second time in the backward pass, by itself, on the same inputs.
        PEFT calls the model's `forward` past its hooks, so of a model that owns its stack nothing is told.
        """
        owner = stack.rpartition(".")[0]
        if not owner:
            return None
        running: list[str] = []
        module = model.get_submodule(owner)
        self._handles.append(module.register_forward_pre_hook(lambda *_: running.append(owner)))
        self._handles.append(module.register_forward_hook(lambda *_: running.clear(), always_call=True))
        return running

    @torch.no_grad()
    def step(self) -> None:
        """Forget a part; to be called after an optimizer step."""
        for found in self.statistics.values():
            for total in _sums(found).values():
                total.mul_(self.decay)

    @torch.no_grad()
    def collected(self) -> CollectedStatistics:
        """What is known, summed over all processes; every one of them has to ask."""
        copies = {}
        for name, found in self.statistics.items():
            sums = {name: total.clone() for name, total in _sums(found).items()}
            tokens = torch.tensor(found.tokens, device=found.squared_sum.device)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                for total in (*sums.values(), tokens):
                    torch.distributed.all_reduce(total)
            # One sequence, as decay leaves no whole number of them: only the scale of all scores depends on it.
            copies[name] = LayerStatistics(
                found.in_features, found.device, found.with_gram, int(tokens), 1, with_sum=found.with_sum, **sums
            )
        return CollectedStatistics(copies, "training")

    def save(self, folder: Path) -> None:
        """Write what was collected into `folder`, whole or not at all; all processes call it, the first one writes."""
        collected = self.collected()
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        tensors = {}
        for name, found in collected.statistics.items():
            tensors |= {f"{name}:{number}": total.cpu() for number, total in enumerate(_sums(found).values())}
            tensors[f"{name}:tokens"] = torch.tensor(found.tokens)
        temporary = folder / f".{FILE}"
        save_file(tensors, temporary)
        # A kill in between leaves the checkpoint without statistics, and not with half of them.
        os.replace(temporary, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote into `folder`, if it did; in one process only, as it holds the sum of all."""
        if not (folder / FILE).is_file():
            return
        try:
            tensors = load_file(folder / FILE)
        except SafetensorError as error:
            raise ValueError(f"{folder / FILE} is damaged ({error}); remove it, and collecting begins anew.") from None
        for name, found in self.statistics.items():
            for number, total in enumerate(_sums(found).values()):
                total.copy_(tensors[f"{name}:{number}"])
            found.tokens = int(tensors[f"{name}:tokens"])

    def release(self) -> None:
        """Stop collecting."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _sums(found: LayerStatistics) -> dict[str, Tensor]:
    """The sums that there are: (in_features,) and, where collected, (in_features, in_features); no copies."""
    sums = {"squared_sum": found.squared_sum, "gram": found.gram, "sum": found.sum}
    return {name: total for name, total in sums.items() if total is not None}


def _observe(found: LayerStatistics, running: list[str] | None) -> Callable:
    def observe(module, args, kwargs):
        # An evaluation in between is no training input.
        if module.training and (running is None or running):
            found.update_((args[0] if args else next(iter(kwargs.values()))).detach())

    return observe
