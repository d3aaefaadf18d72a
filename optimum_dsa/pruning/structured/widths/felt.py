"""How much of what a model gives in the end is lost when structures of one unit go: the whole model is run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ....model.architecture import Architecture
from ....model.calls import feed
from ..instead import evaluating


PROBE = 4  # calibration sequences that are run for each unit


class Felt:
    """Compares what the last block gives with what it gave at first: of any family, and without a loss.

    Args:
        batch: inputs by name, (samples, length, ...).
    """

    def __init__(self, model: nn.Module, architecture: Architecture, batch: Mapping[str, Tensor]):
        self.model, self.batch = model, batch
        self.block = model.get_submodule(architecture.stacks[-1].blocks[-1].name)
        self.dense = self._given()

    def change(self) -> float:
        """Mean ‖h − h_dense‖² / ‖h_dense‖² over the tokens of the batch, h being what the last block gives now."""
        change = (self._given() - self.dense).square().sum(-1)
        return float((change / self.dense.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean())

    @torch.no_grad()
    def _given(self) -> Tensor:
        """What the last block gives, (samples, ..., hidden size) float32."""
        given: list[Tensor] = []
        handle = self.block.register_forward_hook(
            lambda module, args, output: given.append(output if isinstance(output, Tensor) else output[0])
        )
        try:
            with evaluating(self.model):
                feed(self.model, self.batch)
        finally:
            handle.remove()
        return given[-1].float()
