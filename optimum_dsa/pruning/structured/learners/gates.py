"""Gates: a number for every structure, by which what it gives is multiplied; no weight is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..structure import Structures


class Gates:
    """Gates of a model's structures: 1 leaves a structure as it is, 0 silences it, as cutting it out would.

    They stand where what structures give is read, in front of the matrices that read it, so that any family has them
    and gradients reach them. Held are the numbers of columns alone.

    Args:
        structures: unit -> its structures.
    """

    def __init__(self, model: nn.Module, structures: Mapping[str, Structures]):
        self.model, self.structures = model, structures
        # Looked up now: adapters that come later stand between a module and the name of its matrix.
        self._owners = {unit: self._owner(each) for unit, each in structures.items()}

    def sizes(self) -> dict[str, int]:
        """Unit -> how many gates it has."""
        return {unit: len(each) for unit, each in self.structures.items()}

    def _owner(self, each: Structures) -> Tensor:
        """The structure that each input of what reads a unit belongs to, (in_features,) int64; their number: none."""
        cut = each.reads[0]
        width = self.model.get_parameter(cut.tensor).shape[cut.axis]
        owners = torch.full((width,), len(each), dtype=torch.int64, device=cut.index.device)
        owners[cut.index] = torch.arange(len(each), device=cut.index.device)[:, None]
        return owners

    @contextmanager
    def at(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the model with these gates: unit -> (structures,); units that are not named have none."""
        handles = []
        try:
            for unit, gate in values.items():
                columns = self._columns(unit, gate)
                for reader in {cut.tensor.rpartition(".")[0] for cut in self.structures[unit].reads}:
                    handles.append(self.model.get_submodule(reader).register_forward_pre_hook(_times(columns)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def fold(self, values: Mapping[str, Tensor]) -> None:
        """Make gates a part of the matrices that read structures, in place: the model gives what it gave with them."""
        for unit, gate in values.items():
            columns = self._columns(unit, gate)
            for cut in self.structures[unit].reads:
                parameter = self.model.get_parameter(cut.tensor)
                shape = [-1 if axis == cut.axis else 1 for axis in range(parameter.dim())]
                parameter.data = (parameter.data.float() * columns.to(parameter.device).view(shape)).to(
                    parameter.dtype
                )

    def _columns(self, unit: str, gate: Tensor) -> Tensor:
        """The gates of a unit by the inputs of what reads it, (in_features,); 1 where an input belongs to none."""
        return torch.cat([gate, gate.new_ones(1)])[self._owners[unit].to(gate.device)]


def _times(columns: Tensor):
    def hook(module: nn.Module, inputs: tuple) -> tuple:
        given = inputs[0]
        return (given * columns.to(device=given.device, dtype=given.dtype), *inputs[1:])

    return hook
